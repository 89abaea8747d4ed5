"""Imports follow the layers in docs/architecture.md."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "pretrain", "finetune", "experiment")

# Top to bottom: a module imports from its own layer or a lower one.
PRETRAIN_LAYERS = (
    ("pretrain.run",),
    ("pretrain.rank_process", "pretrain.preparation", "pretrain.plan"),
    ("pretrain.training",),
    ("pretrain.training_stream", "pretrain.evaluate"),
    ("pretrain.resolve",),
    (
        "pretrain.engine",
        "pretrain.resume",
        "pretrain.run_identity",
        "pretrain.restore",
        "pretrain.training_progress",
    ),
    ("pretrain.modeling", "pretrain.inspection"),
    ("pretrain.batching",),
    ("pretrain.cleaning",),
    ("pretrain.corpus", "pretrain.config"),
    (
        "pretrain.world",
        "pretrain.gate",
        "pretrain.rank_heartbeat",
        "pretrain.ds_configs",
        "pretrain.optimizer_config",
        "pretrain.schedule_config",
    ),
)

FINETUNE_LAYERS = (
    ("finetune.run", "finetune.serve", "finetune.export"),
    ("finetune.parallel_seeds", "finetune.seed_run", "finetune.probe"),
    ("finetune.results.finetuned_card", "finetune.results.seed_summary"),
    ("finetune.resolve",),
    ("finetune.training", "finetune.prediction"),
    ("finetune.model_trial", "finetune.inference", "finetune.evaluation_texts", "finetune.data_report"),
    ("finetune.results",),
    ("finetune.prepared_task",),
    ("finetune.config", "finetune.model"),
    ("finetune.kinds",),
    ("finetune.task_kind",),
    ("finetune.encoding",),
    ("finetune.data", "finetune.scores", "finetune.pooling"),
    ("finetune.device", "finetune.options", "finetune.masked_tokens"),
)

ONLY_IN = {
    "deepspeed": ("pretrain.engine",),
    "wandb": ("experiment.tracking",),
    "tensorboard": ("experiment.tracking",),
    "fastapi": ("finetune.serve",),
    "onnx": ("finetune.export",),
    "onnxruntime": ("finetune.export", "finetune.prediction.onnx_model"),
    "fsspec": ("experiment.storage",),
    "datasets": ("experiment.hub_data",),
    "datatrove": ("pretrain.cleaning",),
}


@functools.cache
def imports_by_module() -> dict[str, list[str]]:
    """The modules that each module imports, also inside functions."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            imported = []
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.append(node.module)
            found[module] = imported
    return found


def test_no_module_imports_itself_through_others() -> None:
    """Catches a circle of imports, also of imports inside functions."""
    known = imports_by_module()
    TopologicalSorter({module: known.keys() & set(names) for module, names in known.items()}).prepare()  # CycleError


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("experiment", ("pretrain", "finetune", "launcher")),
        ("pretrain", ("finetune", "launcher")),
        ("finetune", ("pretrain", "launcher")),
    ],
)
def test_packages_import_only_lower_packages(package: str, others: tuple[str, ...]) -> None:
    """Catches a shared module that imports its users, and pretraining and fine-tuning that import each other."""
    found = [
        (module, name)
        for module, imported in imports_by_module().items()
        for name in imported
        if is_within(module, package) and any(is_within(name, other) for other in others)
    ]
    assert found == []


def test_folders_of_the_launcher_do_not_import_its_commands() -> None:
    """Catches a part of launching that depends on the command that uses it."""
    folders = ("launcher.hosts", "launcher.ranks", "launcher.preflight", "launcher.supervision")
    found = [
        (module, name)
        for module, imported in imports_by_module().items()
        for name in imported
        if any(is_within(module, folder) for folder in folders)
        and is_within(name, "launcher")
        and not any(is_within(name, folder) for folder in folders)
    ]
    assert found == []


def test_nothing_imports_the_public_functions() -> None:
    """Catches code that starts commands from below, rather than calling what they call."""
    public = {"deepcloze", "launcher.functions"}
    assert [module for module, imported in imports_by_module().items() if public & set(imported)] == []


@pytest.mark.parametrize(("package", "layers"), [("pretrain", PRETRAIN_LAYERS), ("finetune", FINETUNE_LAYERS)])
def test_modules_import_only_lower_layers(package: str, layers: tuple[tuple[str, ...], ...]) -> None:
    """Catches a module that imports from a higher layer."""

    def layer(module: str) -> int | None:
        return next((n for n, layer in enumerate(layers) if any(is_within(module, name) for name in layer)), None)

    modules = [module for module in imports_by_module() if module.startswith(f"{package}.")]
    assert [module for module in modules if layer(module) is None] == []
    found = [
        (module, name)
        for module, imported in imports_by_module().items()
        for name in imported
        if (here := layer(module)) is not None and (there := layer(name)) is not None and there < here
    ]
    assert found == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_are_imported_only_in_their_packages(library: str) -> None:
    """Catches a library that is imported outside its packages, so that its API changes affect the whole tree."""
    users = [
        module for module, imported in imports_by_module().items() if any(is_within(name, library) for name in imported)
    ]
    assert users, f"nothing imports {library}: were folders renamed?"
    assert [user for user in users if not any(is_within(user, package) for package in ONLY_IN[library])] == []


def test_names_of_test_files_are_unique() -> None:
    """Catches a file that pytest refuses in a run of all tests, and accepts alone."""
    folders: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folders.setdefault(path.name, []).append(str(path.parent.relative_to(ROOT)))
    assert {name: found for name, found in folders.items() if len(found) > 1} == {}
