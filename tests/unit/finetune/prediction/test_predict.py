import csv
import json
import os
import platform
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from experiment.config import build_config
from experiment.errors import UserError
from finetune.data.formats import FileFormat
from finetune.encoding.examples import Split
from finetune.options import PredictOptions
from finetune.prediction import predict as predict_module
from finetune.prediction.predict import Input, _overrides
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import TASK_FILE
from finetune.task_kind import Prediction, find_kind
from hub_server import HubServer
from launcher.cli import main

Row = dict[str, str]
PROBABILITIES = ["probability_high", "probability_low"]


def read_csv(path: Path, separator: str = ",") -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


@pytest.fixture
def texts(trained_run: Path, tmp_path: Path) -> Path:
    """The test split without labels."""
    path = tmp_path / "texts.tsv"
    rows = read_csv(trained_run.parent / "test.tsv", "\t")
    path.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    return path


def predict(model: Path, source: Path, output: Path, *flags: str) -> int:
    argv = ["--model", str(model), "--input", str(source), "--output", str(output), "--precision=fp32", *flags]
    return main(["predict", *argv])


def test_it_writes_the_predictions_of_training(trained_run: Path, texts: Path, tmp_path: Path) -> None:
    """Catches rows in the order of the length-sorted batches, and other columns than in the files of a run."""
    assert predict(trained_run / "seed-2" / "model", texts, tmp_path / "out.csv", "--batch_size=3") == 0
    rows, expected = read_csv(tmp_path / "out.csv"), read_csv(trained_run / "seed-2" / "predictions-test.csv")
    assert list(rows[0]) == ["row", "text", "predicted", *PROBABILITIES]
    for row, other in zip(rows, expected, strict=True):
        assert [row[key] for key in ("row", "text", "predicted")] == [
            other[key] for key in ("row", "text", "predicted")
        ]
        assert float(row["probability_high"]) == pytest.approx(float(other["probability_high"]), abs=1e-5)


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_all_formats_hold_the_same_rows(trained_run: Path, texts: Path, tmp_path: Path, suffix: str) -> None:
    """Catches a format with other columns or types: numbers must be numbers in JSON and Parquet."""
    for name in (".csv", suffix):
        assert predict(trained_run / "seed-1", texts, tmp_path / f"out{name}") == 0
    expected = read_csv(tmp_path / "out.csv")
    found: list[dict[str, Any]]
    if suffix == ".parquet":
        found = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    elif suffix == ".jsonl":
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    else:
        found = list(read_csv(tmp_path / "out.tsv", "\t"))
    assert [{key: str(value) for key, value in row.items()} for row in found] == expected
    if suffix != ".tsv":
        assert [type(value) for value in found[0].values()] == [int, str, str, float, float]


def test_memory_does_not_grow_with_the_file(
    trained_run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a file that is read whole before the first row is predicted, and row numbers that restart."""
    at_once: list[int] = []
    read: list[int] = []
    compute, records = Predictor.predict_split, predict_module.read_records

    def count_computed(self: Predictor, chunk: Split, calibrated: bool) -> list[Prediction]:
        at_once.append(len(chunk.table))
        assert sum(read) - 20 <= sum(at_once)  # the file was read once before, to check it
        return compute(self, chunk)

    def count_read(*arguments: Any, **options: Any) -> Iterator[Any]:
        for record in records(*arguments, **options):
            read.append(1)
            yield record

    monkeypatch.setattr(predict_module, "_CHUNK", 2)
    monkeypatch.setattr(Predictor, "predict_split", count_computed)
    monkeypatch.setattr(predict_module, "read_records", count_read)
    assert predict(trained_run / "seed-1", texts, tmp_path / "out.csv", "--batch_size=4") == 0
    assert at_once == [8, 8, 4]
    assert [row["row"] for row in read_csv(tmp_path / "out.csv")] == [str(number) for number in range(1, 21)]


def test_memory_does_not_grow_with_the_texts(
    trained_run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes of windows and outputs for thousands of long texts, of which few would do."""
    sizes: list[list[int]] = []
    compute = Predictor.predict_split

    def count(self: Predictor, chunk: Split, calibrated: bool) -> list[Prediction]:
        sizes.append([len(record.values["text"]) for record in chunk.table.records])
        return compute(self, chunk)

    monkeypatch.setattr(predict_module, "_CHARACTERS", 100)
    monkeypatch.setattr(Predictor, "predict_split", count)
    assert predict(trained_run / "seed-1", texts, tmp_path / "out.csv") == 0
    assert sum(map(len, sizes)) == 20
    assert len(sizes) > 4
    assert all(sum(lengths[:-1]) < 100 for lengths in sizes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_leaves_no_file(
    number: signal.Signals, trained_run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hidden file with the rows so far after a job ends at its time limit, or its terminal is closed."""

    def stop(*_: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the command continues")

    signal.signal(number, lambda *_: None)
    monkeypatch.setattr(Predictor, "predict_split", stop)
    assert predict(trained_run / "seed-1", texts, tmp_path / "out" / "out.csv") == 130
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_has_left_is_removed(trained_run: Path, texts: Path, tmp_path: Path) -> None:
    """Catches hidden files of gigabytes, one more after each kill; and removal of what others write, or have left."""
    running, ended, host = os.getppid(), 2**22 + 1, platform.node()  # Linux has fewer threads
    left = tmp_path / f".out[1].csv.{host}.{ended}"
    kept = [
        tmp_path / f".out[1].csv.{host}.{running}",
        tmp_path / f".other.csv.{host}.{ended}",
        tmp_path / f".out1.csv.{host}.{ended}",
        tmp_path / f".out[1].csv.another-host.{ended}",
    ]
    for path in (left, *kept):
        path.write_text("row")
    assert predict(trained_run / "seed-1", texts, tmp_path / "out[1].csv") == 0
    assert set(tmp_path.iterdir()) == {texts, tmp_path / "out[1].csv", *kept}


def test_cut_texts_are_counted(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches truncated texts that are predicted without a message."""
    source = tmp_path / "texts.tsv"
    monkeypatch.setattr(predict_module, "_CHUNK", 1)
    source.write_text("text\n" + "word1\n" * 3)
    assert predict(trained_run / "seed-1", source, tmp_path / "out.csv", "--batch_size=1") == 0
    assert "were cut" not in capsys.readouterr().err
    source.write_text("text\n" + f"word1\n{'word1 ' * 15}\n{'word1 ' * 14}\n{'word1 ' * 40}\n")
    assert predict(trained_run / "seed-1", source, tmp_path / "out.csv", "--batch_size=1") == 0
    assert "\n2 of 4 rows were cut at 16 tokens\n" in capsys.readouterr().err


def test_a_run_stands_for_its_best_seed(
    trained_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the first or last seed instead of the best one on validation, and a choice that is not told."""
    values = json.loads((trained_run / "results.json").read_text())["splits"]["validation"]["macro_f1"]["values"]
    best = 1 + values.index(max(values))
    assert predict(trained_run, texts, tmp_path / "out.csv") == 0
    assert f"seed-{best}/model (best of 2 seeds: macro_f1 {max(values):.4f} on validation)" in capsys.readouterr().err


def test_scores_of_a_labelled_file(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches scores that differ from those of training, or leave no file."""
    source, output = trained_run.parent / "test.tsv", tmp_path / "out.csv"
    assert predict(trained_run / "seed-1" / "model", source, output, "--score") == 0
    rows = read_csv(output)
    assert list(rows[0]) == ["row", "text", "label", "predicted", *PROBABILITIES]
    written = json.loads((tmp_path / "out.scores.json").read_text())
    splits = json.loads((trained_run / "results.json").read_text())["splits"]
    expected = {name: score["values"][0] for name, score in splits["test"].items()}
    assert written["scores"] == pytest.approx(expected)
    assert (written["rows"], written["metric"], written["input"]) == (20, "macro_f1", str(source))
    assert sum(scores["support"] for scores in written["label_scores"].values()) == 20
    results = json.loads((trained_run / "results.json").read_text())
    assert written["ece"] == pytest.approx(results["calibration"]["test"]["ece"]["values"][0])
    printed = capsys.readouterr().out
    assert "macro_f1 *" in printed
    assert "precision" in printed
    assert str(tmp_path / "out.scores.json") in printed


def test_calibrated_probabilities(
    trained_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a temperature that is never used, is used unasked, or changes what is predicted."""
    model = Path(shutil.copytree(trained_run / "seed-1" / "model", tmp_path / "moved"))
    task = json.loads((model / TASK_FILE).read_text())
    assert task["temperature"] == json.loads((trained_run / "results.json").read_text())["temperatures"][0]
    (model / TASK_FILE).write_text(json.dumps({**task, "temperature": 2.0}))
    for name, flags in (("raw", ()), ("calibrated", ("--calibrated",))):
        assert predict(model, texts, tmp_path / f"{name}.csv", *flags) == 0
    for raw, calibrated in zip(read_csv(tmp_path / "raw.csv"), read_csv(tmp_path / "calibrated.csv"), strict=True):
        assert raw["predicted"] == calibrated["predicted"]
        odds = [float(row["probability_high"]) / float(row["probability_low"]) for row in (raw, calibrated)]
        assert odds[0] ** 0.5 == pytest.approx(odds[1], rel=0.02)
    (model / TASK_FILE).write_text(json.dumps({**task, "temperature": None}))
    assert predict(model, texts, tmp_path / "none.csv", "--calibrated") == 2
    assert "calibrated: the model has no temperature" in capsys.readouterr().err


def test_a_missing_temperature_is_found_first(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a kind without a temperature that is detected after the input is read and the model loaded."""
    model = Path(shutil.copytree(trained_run / "seed-1" / "model", tmp_path / "model"))
    task = json.loads((model / TASK_FILE).read_text())
    (model / TASK_FILE).write_text(json.dumps({**task, "temperature": None}))
    monkeypatch.setattr(Predictor, "load", None)
    assert predict(model, tmp_path / "none.csv", tmp_path / "out.csv", "--calibrated") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "calibrated: the model has no temperature" in line


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("/proc/none/out.csv", "No such file or directory"),
        ("in.csv/out.csv", "File exists"),
        ("folder.csv", "Is a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_first(
    trained_run: Path,
    tmp_path: Path,
    output: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, and predictions that are lost because they cannot be written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "load", None)
    Path("in.csv").write_text("text\nword1\n")
    Path("folder.csv").mkdir()
    assert predict(trained_run, Path("in.csv"), Path(output)) == 2
    assert capsys.readouterr().err.splitlines() == [f"deepcloze: --output: cannot write {output}: {reason}"]


def test_columns_and_separator_of_another_file(trained_run: Path, tmp_path: Path) -> None:
    """Catches files that must look like the training data."""
    (tmp_path / "reviews.csv").write_text('id;review\n1;word1 "word2\n2;word30\n')
    flags = ("--columns.text=review", "--sep=;", "--quoting=3")
    assert predict(trained_run, tmp_path / "reviews.csv", tmp_path / "out.csv", *flags) == 0
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ['word1 "word2', "word30"]
    (tmp_path / "bare.csv").write_text("1,word1\n2,word30\n")
    flags = ("--columns.text=1", "--columns.label=0", "--header=none")
    assert predict(trained_run, tmp_path / "bare.csv", tmp_path / "out.csv", *flags) == 0
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["word1", "word30"]


def test_columns_of_a_dialogue() -> None:
    """Catches names that a file for a model with context must have, and context for a model without it."""
    options = PredictOptions(model="m", input="i.csv", output="o.csv", overrides={"dialogue.group": "scene"})
    config_type, task = find_kind("classification").config_type, {"train": "a.csv", "metric": "accuracy"}
    trained = build_config(config_type, task | {"dialogue": {"group": "id"}, "special_tokens_in_text": True})
    assert _overrides(options, trained) == {"dialogue.group": "scene"}
    with pytest.raises(UserError, match=r"^unknown flag '--dialogue.group'; columns are named as --columns.text=NAME$"):
        _overrides(options, build_config(config_type, task))


def test_a_file_without_header_and_labels(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a number that is asked for the column of the labels, which predicting does not read."""
    (tmp_path / "bare.csv").write_text("word1\nword30\n")
    flags = ("--columns.text=0", "--header=none")
    assert predict(trained_run, tmp_path / "bare.csv", tmp_path / "out.csv", *flags) == 0
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["word1", "word30"]
    assert predict(trained_run, tmp_path / "bare.csv", tmp_path / "out.csv", *flags, "--score") == 2
    assert "bare.csv:1: no column 'label'; found: 0 (--columns.label names" in capsys.readouterr().err


def test_a_header_or_its_lack_is_seen(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a header that gets a prediction silently, and data that is listed as names of columns."""
    (tmp_path / "with.csv").write_text("text\nword1 word2\n")
    (tmp_path / "without.csv").write_text("word1 word2 , word3\nword30\n")
    flags = ("--columns.text=0", "--header=none", "--sep=;")
    assert predict(trained_run, tmp_path / "with.csv", tmp_path / "out.csv", *flags) == 0
    warning = "with.csv:1: this row is read as data; if it is a header (text), set --header 0"
    assert [message.rpartition("/")[2] for message in caplog.messages] == [warning]
    assert predict(trained_run, tmp_path / "without.csv", tmp_path / "out.csv", "--sep=;") == 2
    assert "no column 'text'; found: word1 word2 , word3 (--columns.text names" in (error := capsys.readouterr().err)
    assert error.endswith("; if the first row is data, set --header none and name columns by their numbers, from 0\n")

    caplog.clear()
    (tmp_path / "labelled.csv").write_text("word1,low\nword30,high\n")
    assert predict(trained_run, tmp_path / "labelled.csv", tmp_path / "out.csv", "--columns.text=0", "--sep=,") == 0
    warning = "labelled.csv: the first row is read as a header, but 'low' in it is one of the labels; if it is data, "
    assert [message.rpartition("/")[2] for message in caplog.messages] == [f"{warning}set --header none"]
    assert "columns by number, text: 'word1'\n" in capsys.readouterr().err
    caplog.clear()
    (tmp_path / "named.csv").write_text("text,low\nword1,1\n")
    assert predict(trained_run, tmp_path / "named.csv", tmp_path / "out.csv") == 0
    assert not caplog.messages, "a column has the name of a label"
    (tmp_path / "numbers.csv").write_text("9,8\nword1,1\n")
    assert predict(trained_run, tmp_path / "numbers.csv", tmp_path / "out.csv", "--columns.text=9") == 0
    capsys.readouterr()
    assert predict(trained_run, tmp_path / "labelled.csv", tmp_path / "out.csv", "--header=null") == 2
    assert capsys.readouterr().err == (
        "deepcloze: command line: columns.text: without a header it must be a column number from 0, found 'text'\n"
    )


def test_another_separator(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a message on a column that is not found, though the separator is the cause."""
    (tmp_path / "rows.csv").write_text("id;text\n1;word1\n")
    assert predict(trained_run, tmp_path / "rows.csv", tmp_path / "out.csv") == 2
    assert "found: id;text (--columns.text names the column); is the separator ','? If not, set --sep; " in (
        capsys.readouterr().err
    )
    assert predict(trained_run, tmp_path / "rows.csv", tmp_path / "out.csv", "--sep=;", "--columns.text=review") == 2
    assert "is the separator" not in capsys.readouterr().err


@pytest.fixture
def with_format(trained_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of a model folder whose training data had another format."""

    def change(**keys: object) -> Path:
        model = Path(shutil.copytree(trained_run / "seed-1" / "model", tmp_path / "model"))
        saved = json.loads((model / TASK_FILE).read_text())
        (model / TASK_FILE).write_text(json.dumps({**saved, "task": {**saved["task"], **keys}}))
        return model

    return change


QUOTED = 'review,id\n"word1, word2",1\n"word30 ""word3""",2\n'


def test_an_ordinary_csv_file_for_a_model_of_an_unquoted_tsv_file(
    with_format: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches quotes that get into the texts, or commas in them that are separators, because the TSV file of the
    training has no quoting; and a TSV file or a flag for which it is forgotten."""
    model = with_format(quoting=3)
    (tmp_path / "reviews.csv").write_text(QUOTED)
    assert predict(model, tmp_path / "reviews.csv", tmp_path / "out.csv", "--columns.text=review") == 0
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["word1, word2", 'word30 "word3"']
    (tmp_path / "texts.tsv").write_text('text\n"word1" word2\n')
    (tmp_path / "texts.csv").write_text('text\n"word1" word2\n')
    for name, flags in (("texts.tsv", ()), ("texts.csv", ("--quoting=3",)), ("texts.csv", ("--sep=\t",))):
        assert predict(model, tmp_path / name, tmp_path / "out.csv", *flags) == 0
        assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ['"word1" word2']


@pytest.mark.parametrize("train", ["eng.train", "train.txt", "new.csv"])
def test_a_name_says_the_format_if_training_had_no_such_files(
    with_format: Callable[..., Path], tmp_path: Path, train: str
) -> None:
    """Catches a CSV file that is read as CoNLL, in which any text is words to tag, because `task.format` was needed for
    the names of the training files; and other files, or a flag, for which it is forgotten."""
    model = with_format(format="jsonl", train=train, validation=None, test=None)
    as_csv, as_json = 'text,id\n"word1, word2",1\n', '{"text": "word1, word2"}\n'
    for name, content, flags in (
        ("new.csv", as_json if train == "new.csv" else as_csv, ()),
        ("new.tsv", "text\nword1, word2\n", ()),
        ("new.txt", as_json, ()),
        ("new.lines", as_json, ()),
        ("new.csv", as_json, ("--format=jsonl",)),
        ("new.csv", as_csv, ("--format=auto",)),
    ):
        (tmp_path / name).write_text(content)
        assert predict(model, tmp_path / name, tmp_path / "out.csv", *flags) == 0
        assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["word1, word2"]


def test_bad_rows_are_accepted_in_files_of_the_training_format_only(
    with_format: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches texts with commas that are skipped or cut because rows of the TSV file of the training were, and numbers
    of rows that are not those of the file after a row that is skipped."""
    model = with_format(on_bad_lines="skip")
    (tmp_path / "rows.csv").write_text("text\nword1\nword2, word3\n")
    assert predict(model, tmp_path / "rows.csv", tmp_path / "out.csv") == 2
    assert "rows.csv:3: expected 1 column, found 2; is the separator ','?" in capsys.readouterr().err
    (tmp_path / "rows.tsv").write_text("text\nword1\nword2\tword3\nword4\n")
    assert predict(model, tmp_path / "rows.tsv", tmp_path / "out.csv") == 0
    assert [(row["row"], row["text"]) for row in read_csv(tmp_path / "out.csv")] == [("1", "word1"), ("3", "word4")]


def test_a_header_for_a_model_of_data_without_one(
    with_format: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a header that is predicted as a row of data, and a message that blames the model's file, or names no
    flag; and names of columns that are rejected in a file that is not CSV."""
    model = with_format(header=None, columns={"text": "1", "label": "0"})
    monkeypatch.chdir(tmp_path)
    source, output = Path("in.tsv"), Path("out.csv")
    source.write_text("id\ttext\n7\tword1 word2\n")
    assert predict(model, source, output, "--columns.text=text") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "deepcloze: --columns.text=text: the training data had no header, so columns have numbers from 0; if in.tsv "
        "has a header, set --header 0"
    )
    assert predict(model, source, output) == 2
    assert capsys.readouterr().err == (
        "deepcloze: in.tsv:1: this row looks like a header (id, text), but the training data had none; if it is one, "
        "set --header 0; if it is data, set --header none\n"
    )
    assert not output.exists()
    for flags, texts in (
        (("--header=0", "--columns.text=text"), ["word1 word2"]),
        (("--header=0",), ["word1 word2"]),
        (("--header=none",), ["text", "word1 word2"]),
    ):
        assert predict(model, source, output, *flags) == 0
        assert [row["text"] for row in read_csv(output)] == texts
    Path("in.jsonl").write_text('{"sentence": "word1 word2"}\n')
    assert predict(model, Path("in.jsonl"), output, "--columns.text=sentence") == 0
    assert [row["text"] for row in read_csv(output)] == ["word1 word2"]


def test_labels_are_ignored_unless_they_are_scored(trained_run: Path, tmp_path: Path) -> None:
    """Catches a file that is rejected for its labels, which are not needed."""
    (tmp_path / "odd.jsonl").write_text('{"text": "word1", "label": 0.5}\n{"text": "word2"}\n')
    assert predict(trained_run, tmp_path / "odd.jsonl", tmp_path / "out.csv") == 0
    assert list(read_csv(tmp_path / "out.csv")[0]) == ["row", "text", "predicted", *PROBABILITIES]


def test_cells_are_not_changed(trained_run: Path, tmp_path: Path) -> None:
    """Catches texts that are escaped for spreadsheets or mangled by separators, quotes and line breaks: a predictions
    file is data, and must read back as it was."""
    texts = ["=1+1", "+1", "-1", "@x", "'=1", "a,b\tc", 'say "a"', "two\nlines", "\tword1", "cr\rlf", ""]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = tmp_path / "in.jsonl"
    for name in ("one.csv", "two.tsv", "three.jsonl", "four.csv"):
        assert predict(trained_run, source, tmp_path / name) == 0
        source = tmp_path / name
    assert [row["text"] for row in read_csv(tmp_path / "four.csv")] == texts


def test_scores_name_a_data_set_as_it_was_given(trained_run: Path, tmp_path: Path) -> None:
    """Catches the name of a data set that becomes a path in the working directory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "word1", "label": "low"}\n')
    source = f"hub:{tmp_path / 'data'}"
    assert predict(trained_run, Path(source), tmp_path / "out.csv", "--score") == 0
    assert json.loads((tmp_path / "out.scores.json").read_text())["input"] == source


@pytest.mark.parametrize(
    ("name", "text", "flags", "message"),
    [
        ("in.csv", "sentence\nword1\n", (), "in.csv:1: no column 'text'; found: sentence (--columns.text names"),
        ("in.csv", "text\nword1\n", ("--score",), "in.csv:1: no column 'label'"),
        ("in.csv", "text,label\na,low\nb,\n", ("--score",), "in.csv:3: the label is empty"),
        ("in.csv", "text,label\na,low\nb,middle\n", ("--score",), "in.csv:3: unknown label 'middle'"),
        ("in.csv", "text\n", (), "in.csv has no rows"),
        ("in.csv", "text\nword1\nword1,2\n", (), "in.csv:3: expected 1 column, found 2"),
        ("in.csv", "text\nword1\n", ("--columns.txt=a",), "did you mean 'columns.text'"),
        ("in.csv", "text\nword1\n", ("--task.metric=a",), "unknown flag '--task.metric'"),
        ("in.csv", "text\nword1\n", ("--output=out.xls",), "expected a file that ends in .csv, .tsv, .jsonl"),
        ("in.csv", "text\nword1\n", ("--output=in.csv",), "in.csv is the input"),
        ("in.csv", "text\nword1\n", ("--model=nowhere",), "nowhere: no such folder, and no such model in "),
        ("in.csv", "text\nword1\n", ("--model=.",), ". is neither a Hugging Face folder, a checkpoint nor a run with"),
    ],
)
def test_bad_input_leaves_no_output(
    trained_run: Path,
    tmp_path: Path,
    name: str,
    text: str,
    flags: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, a message that names neither line nor flag, and part of an output."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    assert predict(trained_run, Path(name), Path("out.csv"), *flags) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("command", ["predict --input {input} --output out.csv", "serve --port 0"])
def test_an_onnx_model_of_the_hub(
    trained_run: Path, hub: HubServer, texts: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a pushed ONNX model whose file is not downloaded."""
    files = {path.name: path.read_bytes() for path in (trained_run / "seed-1" / "model").iterdir()}
    del files["model.safetensors"]
    hub.repository("me/onnx").push({**files, "model.onnx": b"damaged"})
    assert main([*command.format(input=texts).split(), "--model", "me/onnx"]) == 2
    assert "/model.onnx is damaged" in capsys.readouterr().err


def test_an_unknown_label_is_found_before_the_model_is_loaded(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hours of predictions that are lost to a wrong label at the end of a file."""
    monkeypatch.setattr(Predictor, "load", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "in.csv").write_text("text,label\na,low\nb,lo\n")
    assert predict(trained_run, tmp_path / "in.csv", tmp_path / "out.csv", "--score") == 2
    said = capsys.readouterr().err
    assert "in.csv:3: unknown label 'lo' (the model has those of its training split, or of task" in said
    assert "; did you mean 'low'?" in said


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("question_answering", {"question": "a?", "context": " "}, "the context is empty"),
        (
            "question_answering",
            {"question": "a?", "context": "b", "answers": {"text": [], "answer_start": []}},
            "no answer; if questions may have none, set task.no_answer: true",
        ),
        ("multiple_choice", {"question": "a?", "choices": ["b"]}, "expected two or more choices"),
        ("cloze", {"article": "a _ b _", "options": [["c", "d"]]}, "2 blanks '_' in the article, 1 lists of options"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_found_first(
    name: str, row: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Catches hours of predictions that are lost to a bad row at the end of a file."""
    kind = find_kind(name)
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    rows = Input(tmp_path / "in.jsonl", kind(kind.config_type(test="t"), ()), FileFormat(), "answers" in row, None)
    with pytest.raises(UserError, match=re.escape(message)):
        rows.count()


def test_scores_do_not_replace_the_input(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an input that is lost because the file of the scores has its name."""
    source = tmp_path / "labels.scores.json"
    source.write_text('[{"label": "high", "text": "word30"}]')
    assert predict(trained_run / "seed-1" / "model", source, tmp_path / "labels.csv", "--score") == 2
    assert f"{source} is the input" in capsys.readouterr().err
    assert source.read_text().startswith("[")


def test_a_pipe_is_rejected(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an empty output and exit code 0: the second reading of a pipe finds nothing."""
    os.mkfifo(tmp_path / "rows.tsv")
    assert predict(trained_run / "seed-1" / "model", tmp_path / "rows.tsv", tmp_path / "out.csv") == 2
    assert "which a pipe cannot be" in capsys.readouterr().err


def test_a_home_folder_can_be_abbreviated(
    trained_run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an output that ends in a folder called `~`: the shell does not expand `--output=~/out.csv`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert predict(trained_run, Path("~") / texts.name, Path("~/out.csv")) == 0
    assert (tmp_path / "out.csv").is_file()
    assert not (tmp_path / "~").exists()


def test_an_input_without_a_known_ending_names_the_flag(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a message that names a key of the training config, which `deepcloze predict` rejects."""
    (tmp_path / "texts.data").write_text("text\nword1\n")
    assert predict(trained_run, tmp_path / "texts.data", tmp_path / "out.csv") == 2
    assert capsys.readouterr().err.endswith(
        "set the format, as --format csv; for a word and its tags per line, set --format conll\n"
    )
    assert predict(trained_run, tmp_path / "texts.data", tmp_path / "out.csv", "--format=csv") == 0
