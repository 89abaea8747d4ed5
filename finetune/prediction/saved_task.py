"""`deepcloze_task.json` in a model folder: the task that the model was trained for, all that it takes to predict.

{"task": {…, as in the config}, "labels": […], "max_seq_length": N, "padded": false, "temperature": T or null,
"spaced_words": false, "checksums": {FILE: checksum}}

The folder is otherwise one of transformers. Without the file, a model with a head for sequence classification, token
classification or multiple choice predicts as a task of that kind, with the labels of its config.

`find_model` finds the folder in a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat

from experiment.config import Section, build_config
from experiment.config.field_types import SequenceLength
from experiment.errors import UserError, require_damage
from experiment.files import checksum, read_json, write_json
from experiment.formatting import counted
from experiment.hub_data import public_data_name
from experiment.models.model_folder import load_model_config
from experiment.models.transformers_models import has_masked_lm_head
from experiment.run_files.checkpoints import find_model_folder
from experiment.run_files.run_folder import RunFolder
from finetune.kinds import kind_names
from finetune.task_kind import TaskKind, find_kind

TASK_FILE = "deepcloze_task.json"
_FOREIGN_KINDS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForMultipleChoice": "multiple_choice",
}
"""Suffix of a transformers class name -> the kind of task that the class was made for."""


@dataclass(frozen=True)
class SavedTask:
    """The task that a model was trained for."""

    kind: TaskKind[Any]
    max_seq_length: int | None  # None: as many tokens as the model has positions
    # Whether all sequences are padded to this length, because the outputs depend on padding. None: it was not trained
    # so, and loading the model shows whether padding has to be avoided.
    padded: bool | None = False
    temperature: float | None = None  # of calibrated probabilities; None if not known
    spaced_words: bool = False  # see `Encoder`; models of earlier versions and of transformers have them
    foreign: bool = False  # whether it was trained elsewhere; see `accepts_pairs`

    @property
    def accepts_pairs(self) -> bool:
        """Whether pairs of texts are accepted beside single texts: a classifier that was trained elsewhere does not say
        which it is for."""
        return self.foreign and set(self.kind.config.columns.without_targets().cell_types()) == {"text"}


class _Content(Section):
    """The file."""

    task: Mapping[str, Any]
    labels: tuple[str, ...]
    max_seq_length: SequenceLength | None
    padded: bool
    temperature: PositiveFloat | None
    spaced_words: bool = True  # of earlier versions
    checksums: Mapping[str, str] = {}  # of the files in the folder, as training wrote them


def write_saved_task(folder: Path, task: SavedTask) -> None:
    """Call when the model and its tokenizer are in the folder. Of the data files, only the names are written: the
    folder may be published. An earlier task file in it is replaced."""
    config = task.kind.config
    names = {split: public_data_name(path) for split, path in config.files().items()}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != TASK_FILE)
    value = {
        "task": config.with_files(names).model_dump(mode="json"),
        "labels": list(task.kind.labels),
        "max_seq_length": task.max_seq_length,
        "padded": task.padded,
        "temperature": task.temperature,
        "spaced_words": task.spaced_words,
        "checksums": {path.name: checksum(path) for path in files},
    }
    write_json(folder / TASK_FILE, value)


def read_saved_task(folder: Path) -> SavedTask:
    """Return the task of a model folder.

    Raises UserError for a file that is damaged, cannot be read, or is not as training wrote it, and for a folder
    without the file whose model has no head that shows its task.
    """
    path = folder / TASK_FILE
    try:
        tree = read_json(path)
    except FileNotFoundError:
        return _read_foreign(folder)
    except (OSError, ValueError) as error:
        require_damage(error, f"{path} cannot be read")
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: expected an object")
    saved = build_config(_Content, tree, origin=str(path))
    _verify(folder, saved.checksums)
    if saved.task.get("kind") not in kind_names():
        raise UserError(f"{path}: this version of deepcloze has no tasks of kind '{saved.task.get('kind')}'")
    kind_type = find_kind(saved.task["kind"])
    kind = kind_type(build_config(kind_type.config_type, saved.task, origin=str(path)), saved.labels)
    return SavedTask(kind, saved.max_seq_length, saved.padded, saved.temperature, saved.spaced_words)


def override_task(saved: SavedTask, overrides: Mapping[str, str]) -> SavedTask:
    """Return the same task with other values of some keys. Raises UserError for an unknown key.

    overrides: dotted keys of the `task` section, such as `columns.text` -> raw text of the command line.
    """
    kind = saved.kind
    # Labels may be named by their columns, which have other names in another file.
    tree = kind.config.model_dump(mode="json") | {"labels": kind.config.known_labels or None}
    config = build_config(type(kind.config), tree, overrides, "command line")
    return replace(saved, kind=type(kind)(config, kind.labels))


def _verify(folder: Path, checksums: Mapping[str, str]) -> None:
    """Raise UserError for a file that is not as training wrote it. An ONNX folder lacks some of them."""
    for name, expected in checksums.items():
        path = folder / Path(name).name
        if path.is_file() and checksum(path) != expected:
            raise UserError(
                f"{path} is damaged, or was changed after training: it does not match its checksum in {TASK_FILE}; to "
                "use it as it is, remove 'checksums' there"
            )


def is_masked_lm(folder: Path) -> bool:
    """Return whether a model folder is for no task but has a masked-LM head."""
    return has_masked_lm_head(load_model_config(folder).architectures) and not (folder / TASK_FILE).is_file()


def _read_foreign(folder: Path) -> SavedTask:
    """Return the task of a model that was trained elsewhere."""
    config = load_model_config(folder)
    architecture = str((config.architectures or ["none"])[0])
    kind_name = next((name for end, name in _FOREIGN_KINDS.items() if architecture.endswith(end)), None)
    labels = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    single_label = config.problem_type in (None, "single_label_classification")
    if has_masked_lm_head(config.architectures):
        raise UserError(
            f"{folder} is a masked language model (architecture: {architecture}), which predicts no labels: `deepcloze "
            "finetune` makes one that does, `deepcloze serve` fills masks"
        )
    if kind_name == "multiple_choice":
        labels = ()  # the labels of the config mean nothing: choices are named by their texts
    elif kind_name is None or not single_label or len(set(labels)) < 2:
        raise UserError(
            f"{folder} has no {TASK_FILE} and is not a sequence classifier with two or more labels, nor a model for "
            f"token classification or multiple choice (architecture: {architecture}, labels: {', '.join(labels)}); "
            "`deepcloze finetune` makes a folder to predict with"
        )
    elif kind_name == "classification" and len(set(labels)) < len(labels):  # its probabilities are by label
        label = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"{folder / 'config.json'}: id2label has '{label}' more than once; give each its own name")
    kind_type = find_kind(kind_name)
    kind = kind_type(build_config(kind_type.config_type, {}), labels)
    return SavedTask(kind, None, padded=None, spaced_words=True, foreign=True)


def find_model(path: Path) -> tuple[Path, str]:
    """Return the model folder that `path` refers to, and a line that says which it is.

    path: a model folder, the folder of a seed, a checkpoint, or a run of either kind; of a pretraining run, the newest
    checkpoint is used. Raises UserError if it is none of these, and for a damaged seed or checkpoint.
    """
    folder, description = path, None
    if not (path / "config.json").is_file():
        if (path / "model" / "config.json").is_file():
            folder = path / "model"
        elif RunFolder(path).results.is_file():
            folder, description = _best_seed(RunFolder(path))
    folder = find_model_folder(folder)
    return folder, description or str(folder)


def _best_seed(run: RunFolder) -> tuple[Path, str]:
    """Return the first of the best seeds whose model was kept."""
    try:
        results = read_json(run.results)
        metric, seeds, validation = results["metric"], results["seeds"], results["splits"].get("validation")
        models = {seed: run.seed_folder(seed) / "model" for seed in seeds}
        values = dict(zip(seeds, validation[metric]["values"], strict=True)) if validation else {}
        choose = min if metric in find_kind(results["kind"]).lower_is_better else max
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        require_damage(error, f"{run.results} cannot be read")
        raise UserError(f"{run.results} is damaged: expected the results of a fine-tuning run") from None
    kept = [seed for seed, folder in models.items() if (folder / "config.json").is_file()]
    if not kept:
        raise UserError(f"{run.path} has kept no model of its seeds; expected RUN/seed-N/model")
    if not values:
        folder, reason = models[kept[0]], "there is no validation split to compare them by"
        return folder, f"{folder} (the first of {counted(len(seeds), 'seed')}: {reason})"
    best = choose(kept, key=values.__getitem__)
    folder = models[best]
    return folder, f"{folder} (best of {counted(len(values), 'seed')}: {metric} {values[best]:.4f} on validation)"
