import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import pytest
import torch
from torch import nn

from experiment.errors import UserError
from pretrain.engine import deepspeed_internals
from pretrain.engine.deepspeed_internals import TESTED, DynamicLossScaler, check_deepspeed

ROOT = Path(__file__).resolve().parents[4]
ENGINE = sorted((ROOT / "pretrain" / "engine").glob("*.py"))
PUBLIC_MODULES = {"deepspeed", "deepspeed.accelerator", "deepspeed.runtime.config", "deepspeed.utils"}
# Objects of DeepSpeed, under the names that they have in pretrain/engine.
OBJECTS = {"engine", "optimizer", "scaler", "swapper", "partition_parameters", "_deepspeed", "_engine"}
CLASSES = {
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "DynamicLossScaler",
    "_FlatOptimizer",
}  # derived from
PARAMETERS = ("_hp_", "ds_")  # how attributes begin that DeepSpeed gives parameters
# Documented methods of DeepSpeed's engine; members that we give its optimizers, and keys of the config.
PUBLIC = {
    *("backward", "destroy", "device", "eval", "get_global_grad_norm", "module", "step", "train"),
    *("was_step_applied", "zero_optimization_stage"),
    *("allocate_sums", "clear_gradients", "communication_dtype", "measure", "reduce_gradients", "shared_memory"),
    *("update", "update_within", "found_inf", "grad_scale", "grad_clip"),
}


@pytest.fixture
def unchecked() -> Iterator[None]:
    check_deepspeed.cache_clear()
    yield
    check_deepspeed.cache_clear()


def listed() -> set[str]:
    return {name for names in deepspeed_internals._USED.values() for name in names.split()}


def attributes(path: Path) -> set[str]:
    """Attributes of DeepSpeed's objects in a file, and of `self` in classes that derive from DeepSpeed's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).rsplit(".", 1)[-1]
            if owner in OBJECTS or node.attr.startswith(PARAMETERS):
                found.add(node.attr)
        elif isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & CLASSES:
            members = [member for member in ast.walk(node) if isinstance(member, ast.Attribute)]
            found |= {member.attr for member in members if ast.unparse(member.value) == "self"} - own_members(tree)
    return found


def own_members(tree: ast.Module) -> set[str]:
    """Methods and attributes that the classes in a file define."""
    names = set()
    for member in (member for node in tree.body if isinstance(node, ast.ClassDef) for member in node.body):
        if isinstance(member, ast.FunctionDef):
            names.add(member.name)
        elif isinstance(member, ast.AnnAssign | ast.Assign):
            names.add(ast.unparse(member.target if isinstance(member, ast.AnnAssign) else member.targets[0]))
    return names


def identifiers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_installed_release_has_everything() -> None:
    """Catches a release of DeepSpeed that renamed something that this package uses."""
    check_deepspeed()


@pytest.mark.usefixtures("unchecked")
def test_what_is_missing_is_named_with_the_tested_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an AttributeError in the middle of a step, after an upgrade."""
    used = {DynamicLossScaler: "cur_scale shift_gear"}
    monkeypatch.setattr(deepspeed_internals, "_USED", used)
    with pytest.raises(UserError) as rejected:
        check_deepspeed()
    message = str(rejected.value)
    assert f"DeepSpeed {deepspeed.__version__} lacks" in message
    assert "DynamicLossScaler.shift_gear;" in message
    assert f"pip install 'deepspeed{TESTED}'" in message


def test_modules_are_imported_in_one_place() -> None:
    """Catches an import whose module a release may move, outside of the list."""
    for path in ENGINE:
        if path.stem != "deepspeed_internals":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
            assert {name for name in imported if name.startswith("deepspeed")} <= PUBLIC_MODULES, path


def test_the_list_is_what_the_package_uses() -> None:
    """Catches an attribute that is used and not listed, or listed and not used any more."""
    used = set().union(*(attributes(path) for path in ENGINE))
    of_torch = {*dir(torch.optim.Optimizer), *dir(nn.Parameter), "param_groups", "state"}
    assert used - PUBLIC - of_torch <= listed()
    words = {word for path in ENGINE if path.stem != "deepspeed_internals" for word in identifiers(path)}
    assert listed() <= words


def test_the_wheel_requires_the_tested_releases() -> None:
    """Catches a wheel that installs with a DeepSpeed that was never tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"deepspeed{TESTED}" in project["dependencies"]
    lowest, above = ([int(part) for part in version.strip("<>=").split(".")] for version in TESTED.split(","))
    assert lowest <= [int(part) for part in deepspeed.__version__.split("+")[0].split(".")] < above
