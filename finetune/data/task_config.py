"""The `task` section of a fine-tuning config: the keys that all kinds of tasks share."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from experiment.config import Section
from experiment.config.field_types import PathText, Seed, Separator
from experiment.csv_and_jsonl import CsvFormat
from experiment.errors import UserError, user_errors_in
from experiment.files import checksum, json_digest
from experiment.hub_data import PREFIX, HubData
from finetune.data.columns import LABEL, Columns, Name
from finetune.data.dialogue import DialogueContext
from finetune.data.formats import FileFormat, FormatName, visible_files


def _check_split_name(name: str) -> str:
    if name in ("train", "validation") or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            "cannot name a test split: expected letters, digits, '_', '.' or '-', but not train or validation"
        )
    return name


SplitName = Annotated[str, AfterValidator(_check_split_name)]


class TaskConfig(Section):
    """The task and its data, see docs/task_data.md. Some keys depend on the kind of task, see docs/task_kinds.md."""

    name: str | None = None
    """Name of the task in results.json; default: the name of the config file."""

    kind: str = "classification"
    """Kind of task: a file in finetune/kinds."""

    train: PathText | None = None
    """Training split, needed by all kinds that are trained: a .csv, .tsv, .txt (tab-separated), .jsonl, .json, .parquet
    or .conll file, or a folder of .json files, relative to the working directory; all but Parquet plain or .gz. Or a
    data set of the Hugging Face Hub, as hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT]. See docs/task_data.md."""

    validation: PathText | None = None
    """Validation split, which decides which epoch is kept; default: a share of the training split."""

    validation_share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Without a validation split: the share of the training split that becomes one, about the same of each label."""

    split_seed: Seed = 0
    """Determines which rows of the training split become the validation split."""

    test: PathText | Mapping[SplitName, PathText] | None = None
    """Test split, scored with the best epoch; predicted only, if it has no labels. Several: a mapping of names to
    files, such as `{matched: …, mismatched: …}`."""

    columns: Columns = Columns()

    dialogue: DialogueContext | None = None
    """For the utterances of dialogues: previous turns that are put before each text, with the tokenizer's separator
    between them. If there are too many tokens, they are cut at the start."""

    has_labels: ClassVar[bool] = True
    """Whether the kind uses `labels`."""

    labels: tuple[Name, ...] | None = None
    """Labels in the order of their ids; default: the labels of the training split, sorted."""

    metric: str
    """Metric that selects the best epoch. All metrics are reported."""

    format: Literal["auto", FormatName] = "auto"
    """Format of the files; `auto`: as their names suggest."""

    sep: Separator | None = None
    """Column separator; default: a comma in .csv files, otherwise a tab."""

    quoting: Literal[0, 3] = 0
    """As in pandas: with 0, double quotes enclose a field; with 3, quotes are ordinary characters."""

    header: Annotated[Literal[0, "none"] | None, AfterValidator(lambda value: None if value == "none" else value)] = 0
    """As in pandas: 0 takes column names from the first row; none or null: there is no header, and `columns` are
    numbers from 0."""

    on_bad_lines: Literal["error", "skip", "drop_extra"] = "error"
    """Rows with fewer or more columns than the first: reject them, skip them with a warning, or drop the columns that
    are too many."""

    special_tokens_in_text: bool = False
    """Whether a special token that is written out in a text, such as `[SEP]`, is that token; otherwise it is text."""

    @property
    def is_trained(self) -> bool:
        """Whether the task needs a training split. If not, its splits are only scored, such as zero-shot."""
        return True

    @property
    def known_labels(self) -> tuple[str, ...]:
        """The labels that the config names; () if it does not."""
        return self.labels or ()

    def file_format(self, as_flags: bool = False) -> FileFormat:
        """Return the format of the files. as_flags: whether messages name the flags of `deepcloze predict`."""
        csv_format = CsvFormat(self.sep, self.quoting, self.header == 0, as_flags, self.on_bad_lines)
        return FileFormat(None if self.format == "auto" else self.format, csv_format)

    def files(self) -> dict[str, str]:
        """Split -> file, of the splits that have one: train, validation, then the test splits."""
        tests = self.test if isinstance(self.test, Mapping) else {"test": self.test}
        splits = {"train": self.train, "validation": self.validation, **tests}
        return {split: path for split, path in splits.items() if path is not None}

    def labels_of(self, values: Mapping[str, Any]) -> Collection[str]:
        """Return the labels of a record's values; a drawn validation split has about as much of each as the rest."""
        return [values[role] for role in self.columns.roles(LABEL)]

    def pinned(self, earlier: Iterable[str] = ()) -> Self:
        """Return the same task with absolute paths, and with the commits of its data sets of the Hub. Raises UserError.

        earlier: names; a data set without a revision gets the first commit that it has there.
        """
        known, files = [HubData.parse(name) for name in earlier if name.startswith(PREFIX)], self.files()
        for split, path in files.items():
            if not path.startswith(PREFIX):
                files[split] = str(Path(path).absolute())
                continue
            with user_errors_in(f"task.{split}"):
                data = HubData.parse(path)
                known.append(data.absolute() if data.is_folder else data.pinned(known))
            files[split] = str(known[-1])
        return self.with_files(files)

    def hub_overrides(self) -> dict[str, str]:
        """Return the keys of splits that are data sets of the Hub, as overrides."""
        test = json.dumps(dict(self.test)) if isinstance(self.test, Mapping) else self.test
        files = {"task.train": self.train, "task.validation": self.validation, "task.test": test}
        return {key: text for key, text in files.items() if text is not None and PREFIX in text}

    def for_model(self, model: str, earlier: Mapping[str, Any]) -> Self:
        """Return the task with the defaults that a model decides. Raises UserError.

        model: as `record_model` returns it. earlier: dotted keys of the run, if it began with this model.
        """
        return self

    def with_files(self, files: Mapping[str, str]) -> Self:
        """Return the same task with other files. files: as `files` returns them."""
        train, validation = files.get("train"), files.get("validation")
        tests = {split: path for split, path in files.items() if split not in ("train", "validation")}
        test = tests if isinstance(self.test, Mapping) else tests.get("test")
        return self.model_copy(update={"train": train, "validation": validation, "test": test})

    @model_validator(mode="after")
    def _columns_are_numbers_without_header(self) -> Self:
        if self.header is None:
            named = {"columns": self.columns} | ({} if self.dialogue is None else {"dialogue": self.dialogue})
            for key, columns in named.items():
                for role in columns.without_targets().cell_types():  # predicting needs no targets
                    if odd := [name for name in columns.names(role) if not name.isdecimal()]:
                        problem = f"without a header it must be a column number from 0, found '{odd[0]}'"
                        raise ValueError(f"{key}.{role}: {problem}")
        return self

    @model_validator(mode="after")
    def _dialogue_has_a_text_and_a_separator(self) -> Self:
        if self.dialogue is not None:
            if "text" not in self.columns.cell_types():
                raise ValueError(f"dialogue: tasks of kind '{self.kind}' have no single text to put turns before")
            if not self.special_tokens_in_text:
                raise ValueError(
                    "dialogue: turns are joined with the tokenizer's separator; set special_tokens_in_text: true"
                )
        return self

    @model_validator(mode="after")
    def _labels_are_used_and_distinct(self) -> Self:
        if self.labels is not None:
            if not self.has_labels:
                raise ValueError(f"labels: tasks of kind '{self.kind}' have none")
            if len(self.labels) < 2:
                raise ValueError(f"labels: needs two or more, found {list(self.labels)}")
            if twice := sorted({label for label in self.labels if self.labels.count(label) > 1}):
                raise ValueError(f"labels: named twice: {', '.join(twice)}")
        return self


def data_checksums(task: TaskConfig) -> dict[str, str]:
    """Split -> checksum of its file, of the files in its folder, or of the name and commit of a data set of the Hub.
    Raises UserError if one does not exist."""
    return {split: _checksum(f"task.{split}", Path(path)) for split, path in task.files().items()}


def _checksum(key: str, path: Path) -> str:
    if str(path).startswith(PREFIX):
        data = HubData.parse(str(path))
        if not data.is_folder:
            return json_digest(str(data.pinned()))
        path = Path(data.name)
    try:
        if path.is_dir():
            return json_digest({str(file.relative_to(path)): checksum(file) for file in visible_files(path)})
        return checksum(path)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
