"""Marks, headline and overlays of reports."""

import errno
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from sample_run import data_of, make_run

from experiment.errors import UserError
from experiment.files import read_json, write_json
from experiment.results.charts import LOOKS, Charts
from experiment.results.history import History
from experiment.results.page import Heading, Runs, Table, Text
from experiment.results.report import training
from experiment.results.report.pages import write_overlay, write_report
from experiment.results.report.run import open_run, open_runs
from experiment.results.report.run_facts import scaled, task_headline, training_headline
from experiment.results.report.several_runs import (
    compare_blocks,
    difference_blocks,
    differing_keys,
    name_runs,
    overlay_blocks,
    runs_table,
    sweep_blocks,
)
from experiment.results.report.tasks import worst_rows
from experiment.results.report.training import filling_blocks, read_marks, training_blocks
from experiment.run_files.checkpoints import checkpoint_path, mark_complete
from experiment.run_files.goodput import USEFUL, AttemptTime
from experiment.run_files.outcome_file import Outcome, write_outcome
from experiment.run_files.provenance import write_provenance
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.run_sets.run_set import PlannedRun, RunSet


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Not changed by tests."""
    return make_run(tmp_path_factory.mktemp("runs") / "base")


def test_what_happened_is_marked(run: RunFolder) -> None:
    """Catches restarts at the step of the crash instead of the checkpoint, and stages that start one too early."""
    marks = read_marks(open_run("base", run))
    assert [(mark.kind, mark.step) for mark in marks] == [
        ("restart", 280),
        ("restart", 800),
        ("bad", 350),
        ("stage", 500),
        ("best", 1000),
    ]
    texts = [mark.text for mark in marks]
    assert texts[0].startswith("attempt 2, 2026-11-20")
    assert texts[2:4] == ["step 350: the loss is nan", "stage 2: max_seq_length 512, sequences 64"]


def test_restarts_stay_where_they_are(tmp_path: Path) -> None:
    """Catches a restart at the last step of an attempt, which is the only line of it that is kept in goodput.jsonl when
    another attempt starts; marks in fine-tuning, and attempts of older versions."""
    folder = open_run_folder(tmp_path)
    for start, step, last in ((10.0, 0, 300), (20.0, 280, 700), (0.0, 650, 900)):  # the clock was set back
        line = {"start": start, "time": start + 9, "step": last, "reached": last, "total_steps": 9, "activity": ""}
        with folder.goodput.open("a") as file:
            file.write("\n" + json.dumps({**line, "seconds": {}}))
        write_provenance(folder, {"date": f"2026-11-20T09:20:{start:02.0f}+00:00", "step": step})
    assert [mark.step for mark in read_marks(open_run("run", folder))] == [280, 650]
    write_provenance(folder, {"date": "2026-11-20T10:20:00+00:00", "step": 500, "total_steps": 900})
    write_provenance(folder, {"date": "2026-11-20T11:20:00+00:00"})  # as by 0.2.0: its step is not known
    write_provenance(folder, {"date": "2026-11-20T12:20:00+00:00", "step": 900})
    assert [mark.step for mark in read_marks(open_run("run", folder))] == [280, 650, 900]
    folder.provenance.write_text("{")
    assert read_marks(open_run("run", folder)) == []


def test_bad_batches_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that reads the files of thousands of bad batches every two seconds, and draws as many lines; and
    one that lacks the newest, keeps a batch that a repeated step has replaced, or lacks all if one cannot be read."""
    folder = open_run_folder(tmp_path)
    for step in range(1, 512):
        write_json(folder.bad_batch(step) / "fault.json", {"step": step, "what": "nan"})
    dumps = folder.bad_batch(0).parent
    os.utime(dumps, (1e9, 1e9))
    run, reads = open_run("run", folder), list[Path]()
    monkeypatch.setattr(training, "read_json", lambda path: (reads.append(path), read_json(path))[1])
    for _ in range(3):
        assert [mark.step for mark in read_marks(run)] == list(range(12, 512))
    assert len(reads) == 500
    write_json(folder.bad_batch(512) / "fault.json", {"step": 512, "what": "nan"})
    assert [mark.step for mark in read_marks(run)][-1] == 512
    (folder.bad_batch(513)).mkdir()
    assert [mark.step for mark in read_marks(run)][-1] == 512
    write_json(folder.bad_batch(513) / "fault.json", {"step": 513, "what": "nan"})
    assert [mark.step for mark in read_marks(run)][-1] == 513
    os.utime(dumps, (1e9, 1e9))
    assert [mark.text for mark in read_marks(run) if mark.step == 500] == ["nan"]
    write_json(folder.bad_batch(500) / "fault.json", {"step": 500, "what": "inf"})
    assert [mark.text for mark in read_marks(run) if mark.step == 500] == ["inf"]

    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, "no answer", path)

    write_json(folder.bad_batch(513) / "fault.json", {"step": 513, "what": "inf"})
    with monkeypatch.context() as patch:
        patch.setattr(training, "read_json", fail)
        assert [mark.step for mark in read_marks(run)][-1] == 512
    assert [mark.text for mark in read_marks(run)][-1] == "inf"


@pytest.mark.parametrize(
    "config", [{}, {"schedule": None}, {"schedule": {"stages": 3}}, {"schedule": {"stages": [1, 2]}}]
)
def test_files_that_are_damaged_mark_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    """Catches a report that fails because a folder is being copied."""
    folder = open_run_folder(tmp_path)
    (folder.bad_batch(3)).mkdir(parents=True)
    (folder.bad_batch(3) / "fault.json").write_text('{"step"')
    folder.checkpoints.mkdir()
    (folder.checkpoints / "best").write_text("")
    folder.goodput.write_text("{")
    assert read_marks(replace(open_run("run", folder), config=config)) == []


def test_the_headline(run: RunFolder) -> None:
    """Catches figures of another event, and a run that is done but does not say so."""
    headline = training_headline(open_run("base", run))
    assert (headline.state, headline.tone) == ("done", "good")
    facts = {fact.name: (fact.value, fact.note) for fact in headline.facts}
    assert facts["Parameters"] == ("64k", "64,000")
    assert facts["Steps"] == ("1,000", "of 1,000, 100%")
    assert facts["Tokens"] == ("32.8M", "32,768,000")
    assert facts["Epochs"] == ("1.60", "of wikipedia")
    assert facts["Precision"] == ("bf16", "")
    assert facts["Duration"] == ("15h33m", "3 attempts")
    assert facts["Best checkpoint"] == ("1,000", "step")
    assert facts["Best held-out loss"][1].startswith("wikipedia, step ")


def test_a_headline_without_files(tmp_path: Path) -> None:
    """Catches a report that fails where only the metrics have been copied so far."""
    folder = open_run_folder(tmp_path)
    folder.metrics.write_text('{"step": 3, "loss": 1.0}\n')
    headline = training_headline(open_run("run", folder))
    assert [(fact.name, fact.value) for fact in headline.facts] == [("Steps", "3"), ("Training loss", "1.0000")]


@pytest.mark.parametrize(("reached", "step"), [(12, 12), (11, 10)])
def test_a_checkpoint_is_newer_than_the_last_event(tmp_path: Path, reached: int, step: int) -> None:
    """Catches a table of runs with fewer steps than the page of a run, a damaged checkpoint that counts, and a page
    that fails because the checkpoints of one run cannot be listed."""
    folder = open_run_folder(tmp_path)
    folder.config.write_text("schedule: {steps: 30}\n")
    folder.metrics.write_text('{"step": 10, "loss": 1.0}\n')
    folder.goodput.write_text(json.dumps(asdict(AttemptTime(1.0, 2.0, reached, reached, 30, USEFUL, {}))))
    checkpoint_path(folder.checkpoints, 12).mkdir(parents=True)
    mark_complete(checkpoint_path(folder.checkpoints, 12))
    run = open_run("run", folder)
    assert next(fact.value for fact in training_headline(run).facts if fact.name == "Steps") == str(step)
    assert runs_table([run]).rows[0].cells[0].text == f"{step} of 30"
    shutil.rmtree(folder.checkpoints)
    folder.checkpoints.symlink_to(folder.checkpoints)  # too many links
    assert runs_table([run]).rows[0].cells[0].text == "10 of 30"


@pytest.mark.parametrize(
    ("outcome", "state"),
    [((Outcome.DONE, ""), ("done", "good", "")), ((Outcome.FAILED, "seed 3"), ("failed", "bad", "seed 3"))],
)
def test_the_headline_of_a_task(tmp_path: Path, outcome: tuple[Outcome, str], state: tuple[str, str, str]) -> None:
    """Catches a metric that is not the primary one, a spread of one seed, and a command that has failed at another seed
    and is shown as done."""
    folder = open_run_folder(tmp_path)
    write_outcome(folder, *outcome)
    accuracy = {"values": [0.8, 0.9], "mean": 0.85, "std": 0.07}
    results = {"metric": "accuracy", "splits": {"test": {"f1": accuracy, "accuracy": accuracy}}, "labels": ["a", "b"]}
    headline = task_headline(open_run("run", folder), results)
    assert (headline.state, headline.tone, headline.message) == state
    assert [(fact.name, fact.value, fact.note) for fact in headline.facts] == [
        ("accuracy on test", "0.8500", "± 0.0700 over 2 seeds"),
        ("Labels", "2", ""),
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (1500, "1.5k"), (999_499, "999k"), (999_500, "1M"), (29_612_345, "29.6M"), (1.2e9, "1.2B")],
)
def test_large_numbers(count: float, text: str) -> None:
    """Catches a unit too large or too small, as in 1e+03k."""
    assert scaled(count) == text


def test_what_differs() -> None:
    """Catches keys that one config lacks, folders as differences, and a config that could not be read."""
    first = {"run.dir": "a", "optimizer.lr": 1, "model.freeze": [], "tracking.name": "x"}
    second = {"run.dir": "b", "optimizer.lr": 2, "model.freeze": [], "batch.sequences": 3, "tracking.name": "y"}
    assert differing_keys([first, second, {}]) == ["optimizer.lr", "batch.sequences"]
    assert differing_keys([first, first]) == differing_keys([]) == []


def test_the_table_of_differences_fits_the_runs(tmp_path: Path) -> None:
    """Catches a table with a column for each of many runs."""
    for number in range(4):
        open_run_folder(tmp_path / str(number)).config.write_text(f"optimizer:\n  lr: {number}\nrun: {{seed: 1}}\n")
    runs = open_runs(name_runs([tmp_path / str(number) for number in range(4)]))
    (table,) = [block for block in difference_blocks(runs) if isinstance(block, Table)]
    assert table.columns == ["run", "optimizer.lr"]
    assert table.rows == [["0", "0"], ["1", "1"], ["2", "2"], ["3", "3"]]
    runs[0].folder.config.write_text("optimizer:\n  lr: null\n")
    runs = open_runs(name_runs([tmp_path / "0", tmp_path / "1"]))
    (table,) = [block for block in difference_blocks(runs) if isinstance(block, Table)]
    assert table.rows == [["optimizer.lr", "null", "1"], ["run.seed", "–", "1"]]


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    """Catches curves of one run on the axis of another, and runs of the same name in different folders."""
    folders = [tmp_path / parent / "base" for parent in ("a", "b")]
    for number, path in enumerate(folders, start=1):
        events = [{"step": step, "tokens": step * number, "tokens_per_second": 1.0, "loss": 1.0} for step in (1, 2)]
        open_run_folder(path).metrics.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    blocks = overlay_blocks(open_runs(name_runs(folders)))
    (charts,) = [block for block in blocks if isinstance(block, Charts)]
    assert [axis["tokens"] for axis in data_of(charts)["axes"]] == [[0, 1, 2], [0, 2, 4]]
    assert [(line["label"], line["run"]) for line in data_of(charts)["charts"][0]["lines"]] == [
        ("a/base", 0),
        ("b/base", 1),
    ]
    page = write_overlay([*folders, folders[0]], tmp_path / "out")
    assert page.read_text(encoding="utf-8").count("<h1>2 runs</h1>") == 1
    assert "<h1>1 run</h1>" in write_overlay(folders[:1], tmp_path / "out").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no run folder"):
        write_overlay([folders[0], tmp_path / "missing"], tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "differing"),
    [
        ({"masking": {"rate": [0.4, 0.3]}}, "masking.rate"),
        ({"batch": {"max_seq_length": 64}}, "batch.max_seq_length"),
        ({"corpus": {"eval": {"wiki": "other"}}}, "corpus.eval.wiki"),
        ({"corpus": {"eval": {"wiki": "wiki"}}}, None),
        ({"corpus": {"eval": {"wiki": "wiki", "books": "others"}}}, None),
        ({"masking": {"rate": [0.3, 0.15], "schedule": "linear"}, "optimizer": {"lr": 2.0}}, None),
    ],
)
def test_losses_that_cannot_be_compared(tmp_path: Path, config: dict[str, Any], differing: str | None) -> None:
    """Catches a chart in which the run with the fewest masks is the best, without a word; and a warning about runs
    that are evaluated alike, or share no chart."""
    tree = {"masking": {"rate": 0.15, "schedule": "constant"}, "batch": {"max_seq_length": 128}}
    tree |= {"corpus": {"eval": {"wiki": "wiki", "books": "books"}}}
    for name, changed in (("a", tree), ("b", {**tree, **config})):
        folder = open_run_folder(tmp_path / name)
        folder.metrics.write_text('{"step": 1, "loss": 1.0, "eval/wiki/loss": 2.0}\n')
        folder.config.write_text(json.dumps(changed))
    runs = open_runs(name_runs([tmp_path / "a", tmp_path / "b"]))
    notes = [block.text for block in overlay_blocks(runs) if isinstance(block, Text)]
    found = [note for note in notes if note.startswith("Losses and accuracies on wiki may not be comparable: ")]
    assert [note.partition(" differ in ")[2] for note in found] == ([] if differing is None else [f"{differing}."])
    other = open_run_folder(tmp_path / "c")  # shares no chart with the two
    other.metrics.write_text('{"step": 1, "loss": 1.0, "eval/news/loss": 2.0}\n')
    other.config.write_text(json.dumps({**tree, "masking": {"rate": 0.9}}))
    three = overlay_blocks(open_runs(name_runs([tmp_path / name for name in "abc"])))
    assert [block.text for block in three if isinstance(block, Text)] == found
    folder.metrics.write_text('{"step": 1, "loss": 1.0, "eval/books/loss": 2.0}\n')
    runs = open_runs(name_runs([tmp_path / "a", tmp_path / "b"]))
    assert not [block for block in overlay_blocks(runs) if isinstance(block, Text)]


@pytest.mark.parametrize(
    ("task", "differing"),
    [
        ({"validation": "b.csv"}, "task.validation"),
        ({"kind": "regression", "train": "b.csv"}, "task.kind"),
        ({"train": "b.csv"}, None),
        ({"validation": None}, "task.validation"),
        ({"labels": ["x"]}, "task.labels"),
        ({"columns": {"negative": "hard"}}, "task.columns.negative"),
        ({"kind": "regression", "validation": "b.csv"}, "task.kind, task.validation"),
    ],
)
def test_validation_losses_that_cannot_be_compared(tmp_path: Path, task: dict[str, Any], differing: str | None) -> None:
    """Catches scores of different tasks in one column without their metrics or a word, and a run that looks better
    because it has more seeds."""
    tree = {"kind": "classification", "train": "a.csv", "validation": "a.csv", "labels": None}
    tree |= {"columns": {"negative": None}}
    for name, seeds, metric, changed in (("a", (1, 2), "f1", tree), ("b", (1,), "accuracy", tree | task)):
        folder = open_run_folder(tmp_path / name)
        events = [{"seed": seed, "step": 3, "eval/validation/loss": 1 / seed} for seed in seeds]
        folder.metrics.write_text("".join(f"{json.dumps(event)}\n" for event in events))
        folder.config.write_text(json.dumps({"task": changed}))
        splits = {"test": {metric: {"values": [0.5], "mean": 0.5, "std": None, "median": 0.5}}}
        write_json(
            folder.results, {"task": "toy", "init": "random", "metric": metric, "seeds": seeds, "splits": splits}
        )
    runs = open_runs(name_runs([tmp_path / "a", tmp_path / "b"]))
    table, *notes = (block for block in overlay_blocks(runs) if isinstance(block, Runs | Text))
    message = "Losses and accuracies on validation may not be comparable: the runs differ in"
    assert notes == ([] if differing is None else [Text(f"{message} {differing}.")])
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["3", "0.7500", "f1 0.5000 on test"],
        ["3", "1.0000 at 3", "accuracy 0.5000 on test"],
    ]


def test_the_metric_of_tasks_has_a_chart(tmp_path: Path) -> None:
    """Catches a report on runs of F1 that shows their accuracy only."""
    for name in ("a", "b"):
        folder = open_run_folder(tmp_path / name)
        event = {"seed": 1, "step": 2, "eval/validation/accuracy": 0.5, "eval/validation/f1": 0.7}
        folder.metrics.write_text(json.dumps(event) + "\n")
    write_json(folder.results, {"task": "toy", "init": "random", "metric": "f1", "seeds": [1], "splits": {}})
    runs = open_runs(name_runs([tmp_path / "a", tmp_path / "b"]))
    (charts,) = [block for block in overlay_blocks(runs) if isinstance(block, Charts)]
    assert [panel.title for panel in charts.panels] == ["Accuracy on validation", "f1 on validation"]
    assert [line["y"] for line in data_of(charts)["charts"][1]["lines"]] == [[0.7], [0.7]]


def test_damaged_results_do_not_stop_a_report_of_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        open_run_folder(tmp_path / name).metrics.write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "b" / "results.json").write_text('{"task"')
    page = write_overlay([tmp_path / name for name in ("a", "b", "c")], tmp_path / "out")
    assert "<h1>2 runs</h1>" in page.read_text(encoding="utf-8")
    assert capsys.readouterr().err.count("results.json is damaged") == 1
    with pytest.raises(UserError, match="none of these runs has anything to report"):
        write_overlay([tmp_path / "b"], tmp_path / "out")


def test_a_run_that_was_killed_at_its_first_event_does_not_stop_a_report_of_other_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a", '{"step": 1, "loss": 1.0}\n'), ("b", '{"step": 1, "lo')):
        open_run_folder(tmp_path / name).metrics.write_text(text)
    page = write_overlay([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "<h1>1 run</h1>" in page.read_text(encoding="utf-8")
    assert "warning: b is left out: no complete event in metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of these runs has anything to report"):
        write_overlay([tmp_path / "b"], tmp_path / "out")


def test_the_runs_of_a_sweep(tmp_path: Path) -> None:
    """Catches runs that are not sorted, and a report that fails for a run that has not started or has diverged."""
    for name, loss in (("lr=1", 2.0), ("lr=2", 1.0)):
        open_run_folder(tmp_path / name).metrics.write_text(f'{{"step": 1, "loss": {loss}}}\n')
    runs = {
        name: {"values": {"lr": name[-1]}, "state": state, "value": value}
        for name, state, value in (("lr=1", "done", 2.0), ("lr=2", "done", 1.0), ("lr=3", "failed", None))
    }
    write_json(tmp_path / "sweep.json", {"metric": "loss", "lower_is_better": True, "runs": runs})
    _, table, *_ = sweep_blocks(RunFolder(tmp_path), open_runs)
    rows = [["lr=2", "done", "2", "1.0000"], ["lr=1", "done", "1", "2.0000"], ["lr=3", "failed", "3", "–"]]
    assert table.rows == rows
    assert "Best first" in write_report(tmp_path).read_text(encoding="utf-8")
    runs["lr=1"]["value"] = float("nan")
    (tmp_path / "sweep.json").write_text(json.dumps({"metric": "loss", "runs": runs}))
    assert "lr=2" in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "sweep.json").write_text('{"runs": 3}')
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        write_report(tmp_path)


def test_points_that_were_taken_out_of_a_grid(tmp_path: Path) -> None:
    """Catches a best point that is no longer in the grid, and may have another config, and its curves."""
    runs = {}
    for value in ("1", "2"):
        name = f"lr={value}"
        open_run_folder(tmp_path / name).metrics.write_text('{"step": 1, "loss": 2.0}\n')
        runs[name] = {"values": {"lr": value}, "state": "done", "value": float(value), "removed": value == "1"}
    write_json(tmp_path / "sweep.json", {"metric": "loss", "lower_is_better": True, "runs": runs})
    blocks = sweep_blocks(RunFolder(tmp_path), open_runs)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.rows == [["lr=2", "done", "2", "2.0000"]]
    (charts,) = [block for block in blocks if isinstance(block, Charts)]
    assert [line["label"] for line in data_of(charts)["charts"][0]["lines"]] == ["lr=2"]


def test_the_curves_of_a_comparison(tmp_path: Path) -> None:
    """Catches rows whose pretraining is missing, curves of different tasks in one chart, and a traceback for a damaged
    file."""
    for name in ("a/sst2", "b/sst2", "b/pretrain"):
        open_run_folder(tmp_path / name).metrics.write_text('{"step": 1, "loss": 2.0}\n')
    write_json(tmp_path / "runs.json", {name: {"state": "done"} for name in ("a/sst2", "b/pretrain", "b/sst2")})
    cell = {"metric": "accuracy", "split": "test", "values": [0.5], "mean": 0.5, "std": None, "collapsed": 0}
    cells = {row: {"sst2": {**cell, "folder": f"{row}/sst2", "chosen": {}, "against": {}}} for row in ("a", "b")}
    write_json(tmp_path / "compare.json", cells)
    blocks = compare_blocks(RunFolder(tmp_path), open_runs)
    found = [
        [line["label"] for line in data_of(block)["charts"][0]["lines"]]
        for block in blocks
        if isinstance(block, Charts)
    ]
    assert found == [["a", "b"], ["b"]]
    for row in ("a", "b"):
        (tmp_path / row / "sst2" / "config.yaml").write_text(f"model: {{init_from: {row}}}\nrun: {{dir: {row}}}\n")
    blocks = compare_blocks(RunFolder(tmp_path), open_runs)
    assert [["a", "a"], ["b", "b"]] in [block.rows for block in blocks if isinstance(block, Table)]
    for damage in ({"values": "x"}, {"mean": None}, {"interval": 3}, {"interval": [0.1]}):
        write_json(tmp_path / "compare.json", {"a": {"sst2": {**cells["a"]["sst2"], **damage}}})
        with pytest.raises(UserError, match=r"compare\.json is damaged"):
            compare_blocks(RunFolder(tmp_path), open_runs)


CELL = {"metric": "f1", "split": "test", "values": [0.5], "mean": 0.5, "std": None, "collapsed": 0, "against": {}}


def comparison_page(folder: Path) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """The texts, the tables' rows and the labels of the curves of each chart."""
    blocks = compare_blocks(RunFolder(folder), open_runs)
    charts = [chart for block in blocks if isinstance(block, Charts) for chart in data_of(block)["charts"]]
    return (
        [block.text for block in blocks if isinstance(block, Heading | Text)],
        [list(row) for block in blocks if isinstance(block, Table) for row in block.rows],
        [[line["label"] for line in chart["lines"]] for chart in charts],
    )


def test_a_comparison_that_was_extended(tmp_path: Path) -> None:
    """Catches rows, tasks and seeds that are missing from the page until all runs are done, failures that it never
    names, and scores of an earlier start without a note; a row that was removed and counts as not done, or as failed,
    forever."""
    for name in ("a-1/sst2", "b/sst2", "c/sst2", "c/cola"):
        open_run_folder(tmp_path / name).metrics.write_text('{"step": 1, "loss": 2.0}\n')
    done, failed = {"config": {"training.seeds": "1"}, "state": "done"}, {"config": {}, "state": "failed (exit code 1)"}
    write_json(tmp_path / "compare.json", {"a + 1": {"sst2": {**CELL, "folder": "a-1/sst2", "chosen": {}}}, "b": {}})
    write_json(tmp_path / "runs.json", {"a-1/sst2": done, "b/sst2": failed})
    texts, rows, curves = comparison_page(tmp_path)
    assert "Not done" not in str(texts)
    assert ["b/sst2", "failed (exit code 1)"] in rows
    assert curves == [["a + 1", "b"]]
    planned = ("a-1/sst2", "c/sst2", "c/cola")
    runs = tuple(PlannedRun(name, (), {"training.seeds": "1,2" if name == "a-1/sst2" else "1"}) for name in planned)
    with suppress(SystemExit), RunSet("compare", RunFolder(tmp_path), "run.dir", "runs.json", runs).opened():
        texts, rows, curves = comparison_page(tmp_path)
    assert "Not done: 3 of 3 runs. The scores are from the last time that all runs had ended." in texts
    assert [text for text in texts if text.startswith("Training")] == ["Training: sst2", "Training: cola"]
    assert curves == [["a + 1", "c"], ["c"]]
    assert ["b/sst2", "failed (exit code 1)"] not in rows
    (tmp_path / "compare.json").unlink()
    again = (*runs, PlannedRun("b/sst2", (), {}))
    with suppress(SystemExit), RunSet("compare", RunFolder(tmp_path), "run.dir", "runs.json", again).opened():
        texts, rows, curves = comparison_page(tmp_path)
    assert ["b/sst2", "failed (exit code 1)"] in rows


def test_the_runs_of_a_cell_are_in_one_chart(tmp_path: Path) -> None:
    """Catches charts that are repeated for each test split of a task, and points of a grid that were not chosen."""
    for point in ("lr=1", "lr=2"):
        open_run_folder(tmp_path / "a/meld" / point).metrics.write_text('{"step": 1, "loss": 2.0}\n')
    write_json(tmp_path / "a/meld/sweep.json", {"metric": "f1", "runs": {"lr=1": {}, "lr=2": {}}})
    write_json(tmp_path / "runs.json", {"a/meld": {"state": "done"}})
    columns = {f"meld {split}": {**CELL, "split": split, "folder": "a/meld/lr=2", "chosen": {}} for split in "xy"}
    write_json(tmp_path / "compare.json", {"a": columns})
    texts, _, curves = comparison_page(tmp_path)
    assert [text for text in texts if text.startswith("Training")] == ["Training: meld"]
    assert curves == [["a"]]
    write_json(tmp_path / "runs.json", {"a/meld": {}})
    assert comparison_page(tmp_path)[2] == [["a/lr=1", "a/lr=2"]]


def test_seeds_are_curves_of_their_own(tmp_path: Path) -> None:
    """Catches the seeds of a fine-tuning joined end to end, so that the loss climbs back at each seed; two seeds of one
    row in different colors; two rows in the same color; and steps in a table that are in no chart."""
    for name, seeds in (("a", (1, 2)), ("b", (1,))):
        joined = [(seed, step, number * 20 + step) for number, seed in enumerate(seeds) for step in (10, 20)]
        events = [{"seed": seed, "step": logged, "loss": 1 / step, "lr": 1e-3} for seed, step, logged in joined]
        open_run_folder(tmp_path / name).metrics.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    runs = open_runs(name_runs([tmp_path / "a", tmp_path / "b"]))
    (charts,) = [block for block in overlay_blocks(runs) if isinstance(block, Charts)]
    for chart in data_of(charts)["charts"]:
        assert [line["x"] for line in chart["lines"]] == [[10, 20]] * 3
    lines = data_of(charts)["charts"][0]["lines"]
    assert [(line["label"], line["seed"]) for line in lines] == [("a", "seed 1"), ("a", "seed 2"), ("b", "seed 1")]
    assert lines[0]["color"] == lines[1]["color"] != lines[2]["color"]
    assert len(data_of(charts)["axes"]) == 3
    table = runs_table(runs)
    assert [row.cells[table.columns.index("steps")].text for row in table.rows] == ["20", "20"]
    assert [row.color for row in table.rows] == [lines[0]["color"], lines[2]["color"]]
    (charts,) = [block for block in training_blocks(runs[0].history) if isinstance(block, Charts)]
    for chart in data_of(charts)["charts"]:
        assert [(line["label"], line["x"]) for line in chart["lines"]] == [("seed 1", [10, 20]), ("seed 2", [10, 20])]


@pytest.mark.parametrize("seeds", [2, 7, 10])
def test_the_splits_of_seeds_have_other_looks(tmp_path: Path, seeds: int) -> None:
    """Catches the validation loss of a seed that looks like its training loss, or like another seed's in the next
    chart."""
    splits = ["validation", "train"][: LOOKS // seeds - 1]
    evaluation = {f"eval/{split}/{name}": 0.5 for split in splits for name in ("loss", "accuracy")}
    folder = open_run_folder(tmp_path)
    events = [{"seed": seed, "step": 1, "loss": 1.0, **evaluation} for seed in range(seeds)]
    folder.metrics.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    charts = next(
        block for block in training_blocks(History.of(folder), metric="accuracy") if isinstance(block, Charts)
    )
    loss, scores = (
        {line["label"]: (line["color"], line["dash"]) for line in chart["lines"]}
        for chart in data_of(charts)["charts"][:2]
    )
    assert len(set(loss.values())) == len(loss) == seeds * (len(splits) + 1)
    assert scores.items() <= loss.items()


def test_the_runs_in_the_charts_have_other_looks(tmp_path: Path) -> None:
    """Catches two runs in the charts of a long list that have the same color and dashes, in the charts or the table."""
    starts = [*range(LOOKS, 0, -1), LOOKS + 1, 0]  # the first ones in the list were not the first ones to start
    for number, start in enumerate(starts):
        folder = open_run_folder(tmp_path / f"run-{number:02}")
        if start:
            folder.metrics.write_text('{"step": 1, "loss": 1.0}\n')
            folder.config.write_text("{}")
            os.utime(folder.config, (start, start))
    runs = open_runs(name_runs(sorted(tmp_path.iterdir())))
    shown = [row for row in runs_table(runs).rows if row.shown]
    assert {row.name for row in shown} == {f"run-{number:02}" for number in range(LOOKS + 1)} - {f"run-{LOOKS - 1}"}
    assert len({(row.color, row.dash) for row in shown}) == LOOKS
    (charts,) = [block for block in overlay_blocks(runs) if isinstance(block, Charts)]
    drawn = {line["label"]: (line["color"], line["dash"]) for line in data_of(charts)["charts"][0]["lines"]}
    assert {row.name: (row.color, row.dash) for row in shown}.items() <= drawn.items()


def test_a_held_out_corpus_called_training(tmp_path: Path) -> None:
    """Catches two lines of one name, of which a page that is followed would draw one twice."""
    event = {"step": 1, "loss": 3.0, "eval/training/loss": 2.0, "eval/wiki/loss": 1.0}
    folder = open_run_folder(tmp_path / "run")
    folder.metrics.write_text(json.dumps(event) + "\n")
    charts = next(block for block in training_blocks(History.of(folder)) if isinstance(block, Charts))
    lines = {line["label"]: line["y"] for line in data_of(charts)["charts"][0]["lines"]}
    assert lines == {"training": [3.0], "training (held-out)": [2.0], "wiki": [1.0]}


def test_the_worst_rows_of_a_task(tmp_path: Path) -> None:
    """Catches a table of the wrong split or seed, one of the whole file, and rows that a copy has cut off."""
    for seed, split, text in ((10, "test", "other"), (9, "validation", "other"), (9, "test", "x" * 500)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        rows = "".join(f"{9 - number},{text},a,b,0.1\n" for number in range(20))
        (folder / f"worst-{split}.csv").write_text(f"loss,text,label,predicted,probability_a\n{rows}0.5,cut")
    (table,) = worst_rows(RunFolder(tmp_path), ["validation", "test"])
    assert table.columns == ["loss", "text", "label", "predicted"]
    assert len(table.rows) == 10
    assert table.rows[0] == ["9", "x" * 299 + "…", "a", "b"]
    assert table.caption == "Highest losses on test, seed-9"
    (tmp_path / "seed-9" / "worst-test.csv").write_text("loss,text,label\n9,x,a\n8,cut")
    (table,) = worst_rows(RunFolder(tmp_path), ["validation", "test"])
    assert table.rows == [["9", "x", "a"], ["8", "cut", ""]]
    assert list(worst_rows(RunFolder(tmp_path / "missing"), ["test"])) == []


def test_fillings_are_shown_by_sentence(tmp_path: Path) -> None:
    """Catches a table by checkpoint, in which nobody sees what the model has learned."""
    assert filling_blocks(RunFolder(tmp_path)) == []
    *_, block = filling_blocks(make_run(tmp_path / "run", steps=100))
    assert len(block.fillings) == 4
    first = block.fillings[0]
    assert (first.before, first.answer, first.after) == ("the default value is ", "none", ", which disables the cache.")
    assert [step for step, _ in first.guesses] == ["step 25", "step 50", "step 100"]
    assert first.guesses[-1][1][0] == ("none", "80.0%")
