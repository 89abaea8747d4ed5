"""`deepcloze export`: copy a model folder, or write its model as ONNX."""

import shutil
from pathlib import Path

from experiment.errors import UserError, describe_disk_error, reason
from experiment.files import read_json
from experiment.formatting import shorten
from experiment.models.hub_names import HubName
from experiment.models.model_names import local_model
from experiment.output_folder import is_free, new_folder
from experiment.run_files.checkpoints import deleted_meanwhile, mention_best, unlisted_files
from finetune.export.exported_card import name_model, write_card
from finetune.export.push import check_target, parse_target, push_folder
from finetune.model import model_files
from finetune.options import ExportOptions
from finetune.prediction.onnx_model import holds_onnx_model, require_packages
from finetune.prediction.saved_task import TASK_FILE, find_model, read_saved_task

# Of a model, beside weights, config and tokenizer: all else in a folder, such as .git, may not be meant for others.
_MORE_FILES = (
    *("deepcloze*.json", "generation_config.json", "chat_template.jinja", "LICENSE*"),
    *("modules.json", "*sentence_*.json"),  # of sentence-transformers
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),  # code of a model of its own
)


def export_command(options: ExportOptions) -> None:
    """Run the command. The output is complete or does not exist. Raises UserError."""
    if options.int8 and options.format != "onnx":
        raise UserError("--int8 needs --format onnx")
    if options.push is None and (options.private or options.overwrite):
        raise UserError("--private and --overwrite need --push OWNER/NAME")
    repository = None if options.push is None else parse_target(options.push)
    path = local_model(options.checkpoint, modules=options.format == "hf", card=True)
    source, _ = find_model(path)
    target = Path(options.output).absolute()
    if not is_free(target):
        raise UserError(f"{target} already exists; choose another --output")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} is in the folder that is exported; choose another --output")
    if repository is not None:
        check_target(repository, source, options.private, options.overwrite)
    try:
        with deleted_meanwhile(source), new_folder(target) as aside:
            lines = _write(source, aside, options, repository)
            if repository is not None:
                name_model(aside, repository.repository)
    except OSError as error:
        raise UserError(f"cannot write {target}: {describe_disk_error(error) or reason(error)}") from None
    mention_best(path, source)
    print("\n".join([f"{source} -> {target}", *lines]))
    if repository is not None:
        print(f"{target} -> {push_folder(target, repository, options.private)}")


def _write(source: Path, folder: Path, options: ExportOptions, repository: HubName | None) -> list[str]:
    """Write the folder with its model card. Returns lines about it."""
    if holds_onnx_model(source):
        raise UserError(f"{source} holds an ONNX model already; export the folder that it was made from")
    title = Path(options.output).absolute().name if repository is None else repository.repository
    if options.format == "hf":
        if (source / TASK_FILE).is_file():
            read_saved_task(source)  # refuses damaged files, as the export to ONNX does
        _copy(source, folder)
        write_card(source, folder, title)
        names = {path.name for path in source.iterdir()} - {path.name for path in folder.iterdir()}
        return [f"left out: {shorten(', '.join(sorted(names)), 200)}"] if names else []
    require_packages("onnx", "onnxruntime", "onnxscript")
    from finetune.export.onnx_folder import write_onnx_folder

    return write_onnx_folder(source, folder, title, options.int8)


def _copy(source: Path, folder: Path) -> None:
    """Copy the files of a model. Raises UserError."""
    unlisted, files, modules = unlisted_files(source), model_files(source, weights=True), _module_folders(source)
    files += [path for pattern in _MORE_FILES for path in source.glob(pattern) if path.is_file()]
    known = {path for file in (*files, *modules) for path in (file, *file.parents)}

    def is_copied(path: Path) -> bool:
        in_module = not path.name.startswith(".") and not modules.isdisjoint(path.parents)
        return path not in unlisted and (path in known or in_module)

    shutil.copytree(source, folder, ignore=lambda at, names: {x for x in names if not is_copied(Path(at, x))})


def _module_folders(source: Path) -> set[Path]:
    """Return the folders of modules of sentence-transformers, such as `1_Pooling`. Raises UserError if one that has
    files is missing."""
    path = source / "modules.json"
    try:
        listed = read_json(path) if path.exists() else []
        modules = {source / module["path"]: str(module.get("type")) for module in listed}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: expected a list of modules, each with its 'path'") from None
    for folder, kind in modules.items():
        if not folder.is_dir() and not kind.endswith(".Normalize"):  # which has no files, so the Hub has no folder
            raise UserError(f"{path} names the module {folder.name}, but there is no such folder")
    return modules.keys() - {source}
