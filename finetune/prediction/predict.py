"""`deepcloze predict`: predict for the rows of a file, which may be larger than the memory."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from experiment.csv_and_jsonl import listed
from experiment.errors import UserError, readable_disk_errors, warn_once
from experiment.files import created_parents, remove_unfinished, write_json
from experiment.formatting import counted
from experiment.hub_data import PREFIX
from experiment.models.model_names import local_model
from experiment.process.hardware import prepare_process
from experiment.progress import progress, terminal
from finetune.data.dialogue import TurnJoiner
from finetune.data.formats import FORMATS, FileFormat, read_rows, separator, suffix
from finetune.data.records import Record, read_records
from finetune.data.task_config import TaskConfig
from finetune.encoding.encoder import turn_joiner
from finetune.options import PredictOptions
from finetune.prediction.predictor import Predictor, check_calibrated
from finetune.prediction.saved_task import find_model, override_task, read_saved_task
from finetune.prepared_task import chunks
from finetune.results.predictions import check_row_file, open_row_file, optional_inputs, prediction_rows
from finetune.results.tables import print_label_scores, print_scores
from finetune.scores.calibration import calibration_error
from finetune.scores.metrics import top_confusions
from finetune.task_kind import Prediction, TaskKind

_COLUMN_NUMBERS = re.compile(r"""[\d\[\], '"]+|null|None""")  # one, a list, or none
# Rows that are read, sorted by length, computed and written together: 64 batches, or fewer if their texts are long, as
# all windows of a long text are in memory.
_CHUNK = 64
_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Input:
    """The rows of a file, read again in each iteration."""

    path: Path
    kind: TaskKind[Any]
    format: FileFormat
    labelled: bool  # whether to read the targets too
    joiner: TurnJoiner | None  # of the turns of dialogues, which are read all at once

    def __iter__(self) -> Iterator[Record]:
        task = self.kind.config
        columns = task.columns if self.labelled else task.columns.without_targets()
        return read_records(read_rows(self.path, self.format), columns, self.labelled, self.joiner, "--")

    def count(self) -> int:
        """Count the rows. Raises UserError for a file that cannot be predicted, before a model is loaded."""
        types = self.kind.config.columns.cell_types()
        targets = [role for role, cell_type in types.items() if cell_type.target and not cell_type.optional]
        count = 0
        for record in self:
            count += 1
            self.kind.check_input(record)
            if not self.labelled:
                continue
            if empty := [role for role in targets if record.values.get(role) is None]:
                raise UserError(f"{record.place}: the {empty[0]} is empty")
            self.kind.check_target(record)
        if not count:
            raise UserError(f"{self.path} has no rows")
        self._name_columns()
        return count

    def _name_columns(self) -> None:
        """Print the names of columns given by number if the file has a header, and warn of a header with a label, which
        is probably data."""
        first = next(iter(read_rows(self.path, self.format)))
        columns, header = self.kind.config.columns.without_targets(), [name.strip() for name in first.names]
        asked = {role: columns.names(role) for role in columns.cell_types()}
        # Without a header, and in other formats than CSV, the numbers are the names.
        if not all(name.isdecimal() and name not in header for names in asked.values() for name in names):
            return
        found = (f"{role}: {listed(repr(header[int(name)]) for name in names)}" for role, names in asked.items())
        terminal().print(f"columns by number, {', '.join(found)}")
        if labels := [name for name in header if name in self.kind.labels]:
            warn_once(
                f"{self.path}: the first row is read as a header, but {labels[0]!r} in it is one of the labels; if it "
                f"is data, set {self.format.csv.option('header', 'none')}"
            )


def predict_command(options: PredictOptions) -> None:
    """Run the command. Raises UserError."""
    prepare_process()
    output = Path(options.output)
    check_row_file(output)
    source = Path(options.input)
    for written in (output, *([_scores_file(output)] if options.score else [])):
        if written.resolve() == source.resolve():
            raise UserError(f"--output: {written} is the input")
        _check_writable(written)
    if source.exists() and not source.is_file() and not source.is_dir():
        raise UserError(f"--input: {source} is not a regular file; it is read twice, which a pipe cannot be")
    folder, description = find_model(local_model(options.model, onnx=True))
    trained = read_saved_task(folder)
    task = override_task(trained, _overrides(options, trained.kind.config))
    check_calibrated(options.calibrated, task.temperature)
    file_format = _input_format(options, task.kind.config, trained.kind.config)
    rows = Input(source, task.kind, file_format, options.score, turn_joiner(folder, task.kind.config))
    count = rows.count()
    terminal().print(f"model: {description}")
    predictor = Predictor.load(folder, options.precision, options.batch_size, task)
    with readable_disk_errors():
        remove_unfinished(output.parent, escape(output.name))
        records, predictions = _write(output, predictor, rows, count, options)
        terminal().print(f"{output}: {counted(count, 'row')}")
        if options.score:
            _report_scores(predictor, records, predictions, options)


def _check_writable(path: Path) -> None:
    """Raise UserError if the file could not be written after hours of predicting."""
    try:
        if path.is_dir():
            raise UserError(f"--output: cannot write {path}: Is a directory")
        with created_parents(path), NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def _scores_file(output: Path) -> Path:
    return output.with_suffix(".scores.json")


def _overrides(options: PredictOptions, trained: TaskConfig) -> Mapping[str, str]:
    """Return keys of the task -> raw text."""
    has_dialogue = trained.dialogue is not None
    read_as = options.format or _format_of_name(Path(options.input), trained)
    file_format = trained.model_copy(update={"format": read_as or trained.format}).file_format()
    is_csv = separator(Path(options.input), file_format) is not None
    header = options.header if is_csv else "0"  # the columns of other formats always have names
    for key, value in options.overrides.items():
        is_of_dialogue = has_dialogue and key.startswith("dialogue.") and key != "dialogue.turns"
        if not key.startswith("columns.") and not is_of_dialogue:
            more = " or --dialogue.group=NAME" if has_dialogue else ""
            raise UserError(f"unknown flag '--{key}'; columns are named as --columns.text=NAME{more}")
        if trained.header is None and header is None and not _COLUMN_NUMBERS.fullmatch(value):
            raise UserError(
                f"--{key}={value}: the training data had no header, so columns have numbers from 0; if {options.input} "
                "has a header, set --header 0"
            )
    keys = {"format": read_as, "sep": options.sep, "quoting": options.quoting, "header": header}
    written = {key: str(value) for key, value in keys.items() if value is not None}
    return {**options.overrides, **written}


def _format_of_name(path: Path, trained: TaskConfig) -> str | None:
    """Return "auto" if a file has a name that says its format, unlike .txt, and training read no such files."""
    known = {suffix(Path(file)) for file in trained.files().values()}
    return "auto" if suffix(path) in FORMATS.keys() - known - {".txt"} else None


def _input_format(options: PredictOptions, task: TaskConfig, trained: TaskConfig) -> FileFormat:
    """Return the input's format: from flags, otherwise as in training, but only for a separator of the training data
    are quotes ordinary characters, and bad rows accepted. Whether there is a header must be said if in doubt. trained:
    without the flags."""
    found = task.file_format(as_flags=True)
    csv_format = replace(found.csv, rejects_header=options.header is None)
    known = {separator(Path(path), trained.file_format()) for path in trained.files().values()}
    if separator(Path(options.input), found) not in known:
        quoting = 0 if options.quoting is None else csv_format.quoting
        csv_format = replace(csv_format, quoting=quoting, on_bad_lines="error")
    return replace(found, csv=csv_format)


def _write(
    output: Path, predictor: Predictor, rows: Input, count: int, options: PredictOptions
) -> tuple[list[Record], list[Prediction]]:
    """Predict in chunks, and write each. Returns all rows and predictions if they are to be scored, otherwise none."""
    records: list[Record] = []
    predictions: list[Prediction] = []
    optional = optional_inputs(predictor.kind, rows if options.score else ())
    cut = 0
    with open_row_file(output) as write, progress("predicting", count, "rows") as advance:
        for chunk in chunks(rows, options.batch_size * _CHUNK, _CHARACTERS):
            split = predictor.encode(chunk)
            cut += split.count_cut()
            found = predictor.predict_split(split, options.calibrated)
            write(prediction_rows(predictor.kind, chunk, found, optional))
            advance(len(chunk))
            if options.score:
                records += chunk
                predictions += found
    if cut:
        terminal().print(f"{cut:,} of {count:,} rows were cut at {predictor.loaded.encoder.max_length:,} tokens")
    return records, predictions


def _report_scores(
    predictor: Predictor, records: Sequence[Record], predictions: Sequence[Prediction], options: PredictOptions
) -> None:
    """Write the scores, and print a table of the metrics and one of the labels."""
    path, kind = _scores_file(Path(options.output)), predictor.kind
    found = records, kind.relate(records, predictions)
    scores, metric = kind.scores(*found), kind.config.metric
    pairs, classified = kind.label_pairs(*found), kind.classified(*found)
    labels = kind.label_scores(*found)
    confusions: list[dict[str, Any]] = []
    if pairs is not None:
        found_pairs, counts = np.unique(pairs[0] * len(kind.labels) + pairs[1], return_counts=True)
        confusions = top_confusions(found_pairs, counts, kind.labels)
    written = {
        "model": str(predictor.folder.absolute()),
        "input": options.input if options.input.startswith(PREFIX) else str(Path(options.input).absolute()),
        "rows": len(records),
        "calibrated": options.calibrated,
        "metric": metric,
        "scores": scores,
        "label_scores": labels,
        "confusions": confusions,
        "ece": None if classified is None else calibration_error(classified),
    }
    write_json(path, written)
    name = Path(options.input).name
    print_scores(counted(len(records), "row"), {name: scores}, metric)
    if labels:
        print_label_scores(name, labels)
    print(path)
