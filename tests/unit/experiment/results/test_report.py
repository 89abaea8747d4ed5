import csv
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from sample_run import data_of

from experiment.errors import UserError
from experiment.files import write_json
from experiment.results.charts import Charts, Mark
from experiment.results.history import NO_AXIS, History
from experiment.results.page import Heading, Table
from experiment.results.report.pages import write_overlay, write_report
from experiment.results.report.tasks import confusion_matrix, downstream_blocks, result_blocks, worst_rows
from experiment.results.report.training import (
    NORM,
    RATE,
    SPEED,
    WAIT,
    held_out_table,
    training_blocks,
    training_table,
)
from experiment.run_files.downstream import DownstreamResult, write_result
from experiment.run_files.goodput import EVALUATING, ActivityTimer
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.provenance import write_provenance
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.run_files.run_lock import lock_run


def training(step: int, **figures: Any) -> dict[str, Any]:
    event = {"step": step, "tokens": 1000 * step, "loss": 10.0 / step, "lr": 1e-4, "grad_norm": 1.0, "loss_scale": None}
    return event | {"tokens_per_second": 100.0 * step, "mfu": None, "data_wait": 0.01, "memory": 2**30} | figures


def evaluation(step: int, corpus: str, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        **{
            f"eval/{corpus}/{name}": value
            for name, value in (("loss", loss), ("perplexity", 2.0**loss), ("accuracy", 0.5))
        },
    }


EVENTS = [
    evaluation(0, "wiki", 9.0),
    *[training(step) for step in range(1, 6)],
    evaluation(3, "wiki", 2.0) | evaluation(3, "a/b", 4.0),
    evaluation(5, "wiki", 3.0) | evaluation(5, "a/b", 3.5),
]
RESULTS = {
    "task": "topics",
    "init": "pretrained",
    "metric": "accuracy",
    "splits": {"test": {"accuracy": {"values": [0.8, 0.9], "mean": 0.85, "std": 0.0707, "median": 0.85}}},
}


def run_with(path: Path, events: list[dict[str, Any]]) -> RunFolder:
    folder = open_run_folder(path / "my-run")
    folder.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_downstream_tasks(tmp_path: Path) -> None:
    """Catches the best score of a metric for which lower is better, a plot of two metrics on one axis, and a last score
    that is the last to be written."""
    folder = run_with(tmp_path, [training(1)])
    for step, accuracy, error in ((300, 0.8, 0.5), (100, 0.9, 0.7), (200, 0.7, 0.2)):
        for task, metric, value, lower in (("sst2", "accuracy", accuracy, False), ("stsb", "error", error, True)):
            write_result(folder, DownstreamResult(step, task, metric, lower, {metric: value}, "w", "c", 1.0))
    _, charts, table = downstream_blocks(folder, NO_AXIS)
    assert [panel.title for panel in charts.panels] == ["accuracy", "error"]
    assert [line["x"] for chart in data_of(charts)["charts"] for line in chart["lines"]] == [[100, 200, 300]] * 2
    assert table.rows == [
        ["sst2", "accuracy", "0.8000", "300", "0.9000", "100"],
        ["stsb", "error", "0.5000", "300", "0.2000", "200"],
    ]
    assert "Downstream tasks" in write_report(folder.path).read_text(encoding="utf-8")


def charts_of(page: Path) -> list[str]:
    """The titles of the charts."""
    return re.findall(r"<figure><figcaption>([^<]+)", page.read_text(encoding="utf-8"))


def test_the_report_of_a_pretraining_run(tmp_path: Path) -> None:
    """Catches images that nobody has asked for, missing ones, and values missing from the page."""
    folder = run_with(tmp_path, EVENTS)
    folder.config.write_text("run:\n  seed: 42\n")
    hardware = {"gpus": [], "cores": 2, "cpu": "Fast CPU"}
    git = {"commit": "0123456789abcdef", "dirty": True}
    attempt = {"date": "2024-05-01T10:20:30+00:00", "host": "h", "world_size": 2, "git": git, "hardware": hardware}
    write_provenance(folder, {**attempt, "versions": {"deepcloze": "0.1.9"}})
    page = write_report(folder.path)
    assert page == folder.report / "index.html"
    assert [path.name for path in folder.report.iterdir()] == ["index.html"]
    text = page.read_text(encoding="utf-8")
    assert write_report(folder.path, png=True).read_text(encoding="utf-8") == text
    names = ["loss.png", "perplexity.png", "accuracy.png", "learning-rate.png", "gradient-norm.png", "throughput.png"]
    assert {path.name for path in folder.report.iterdir()} == {"index.html", *names}
    assert all((folder.report / name).read_bytes().startswith(b"\x89PNG") for name in names)
    for expected in (
        "<h1>my-run</h1>",
        "seed: 42",
        "0123456789 (changed)",
        "2 cores, Fast CPU",
        "2024-05-01 10:20:30 UTC",
        ">0.1.9</td>",
    ):
        assert expected in text


def test_the_tables_say_what_the_events_say(tmp_path: Path) -> None:
    """Catches the first value instead of the last, a best loss at the wrong step, nulls that count as values, and the
    loss of an earlier evaluation, or none at all, of a model that has diverged."""
    history = History.of(run_with(tmp_path, EVENTS))
    assert history.corpora == ["wiki", "a/b"]
    assert held_out_table(history, history.corpora).rows == [
        ["wiki", "3.0000", "8.000", "50.0%", "2.0000", "3"],
        ["a/b", "3.5000", "11.31", "50.0%", "3.5000", "5"],
    ]
    table = training_table(history)
    assert table.columns == ["steps", "tokens", "last loss", "tokens/s", "data wait", "peak memory"], "MFU is unknown"
    assert table.rows == [["5", "5,000", "2.0000", "300", "1.0%", "1.00 GiB"]]
    diverged = {f"eval/wiki/{name}": None for name in ("loss", "perplexity", "accuracy")}
    table = held_out_table(History.of(run_with(tmp_path, [*EVENTS, {"step": 6, **diverged}])), ["wiki"])
    assert table == Table(["corpus", "loss", "best loss", "at step"], [["wiki", "–", "2.0000", "3"]])


def test_what_was_never_measured_is_left_out(tmp_path: Path) -> None:
    """Catches empty plots, and a report that fails for a run without evaluation."""
    folder = run_with(tmp_path, [{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "loss": None}])
    page = write_report(str(folder.path))
    assert charts_of(page) == ["Loss"]


def test_what_is_to_come_is_not_marked(tmp_path: Path) -> None:
    """Catches a legend with a stage that the run has not reached."""
    folder = run_with(tmp_path, [training(1), training(5)])
    marks = [Mark("stage", 5, "now"), Mark("stage", 6, "later")]
    (charts,) = [block for block in training_blocks(History.of(folder), marks=marks) if isinstance(block, Charts)]
    assert data_of(charts)["marks"] == [{"kind": "stage", "step": 5, "text": "now"}]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    """Catches a traceback for a metrics.jsonl that was edited or written by another program."""
    odd = {"step": 2, "loss": "low", "grad_norm": [1], "eval/wiki/loss": {}, "tokens": True}
    folder = run_with(tmp_path, [{"step": 1, "loss": 1.0}, odd])
    assert charts_of(write_report(str(folder.path))) == ["Loss"]


def test_scores_with_intervals(tmp_path: Path) -> None:
    """Catches confidence intervals that are in results.json but not on the page, or in the row of another metric."""
    folder = open_run_folder(tmp_path / "task")
    scores = RESULTS["splits"]["test"]["accuracy"]
    splits = {"validation": {"accuracy": {**scores, "interval": [0.75, 0.91]}}, "test": {"accuracy": scores}}
    write_json(folder.path / "results.json", {**RESULTS, "splits": splits})
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "95 % interval" in text
    assert re.findall(r"<td[^>]*>([^<]*)</td>", text) == [
        *("validation", "accuracy", "0.8500", "0.7500 to 0.9100", "0.0707", "0.8500", "0.8000, 0.9000"),
        *("test", "accuracy", "0.8500", "–", "0.0707", "0.8500", "0.8000, 0.9000"),
    ]


def test_the_confusion_matrix_is_that_of_all_seeds(tmp_path: Path) -> None:
    """Catches the matrix of one seed, of validation where test has one, or of a seed that is not in the results; and a
    report that fails for a task without labels, or for a folder that is being copied."""
    folder = open_run_folder(tmp_path / "task")
    for seed in (1, 2, 3):
        write_json(
            folder.path / f"seed-{seed}" / "COMPLETE",
            {"confusion": {"validation": [[0, 9], [0, 9]], "test": [[5 * seed, 0], [seed, 1000]]}},
        )
    results = {**RESULTS, "labels": ["joy", "fear"], "seeds": [1, 2]}
    (matrix,) = confusion_matrix(folder, results)
    assert (matrix.labels, matrix.counts) == (["joy", "fear"], [[15, 0], [3, 2000]])
    assert matrix.caption == "Confusion matrix on test, all seeds together"
    assert confusion_matrix(folder, {**results, "labels": list(map(str, range(1000)))}) == []  # a page of 9 MB
    write_json(folder.path / "results.json", results)
    assert "2,000" in write_report(folder.path).read_text(encoding="utf-8")
    (folder.path / "seed-2" / "COMPLETE").write_text("{")
    assert confusion_matrix(folder, results) == []
    write_json(folder.path / "seed-1" / "COMPLETE", {"confusion": {}})
    assert confusion_matrix(folder, {**results, "seeds": [1]}) == confusion_matrix(folder, RESULTS) == []


def test_a_validation_split_is_no_held_out_text(tmp_path: Path) -> None:
    """Catches the last seed's last evaluation shown as the result of a fine-tuning run, next to the scores."""
    folder = run_with(tmp_path, [training(1), evaluation(1, "validation", 2.0), training(2)])
    write_json(folder.path / "results.json", RESULTS)
    page = write_report(folder.path)
    assert charts_of(page) == ["Loss", "accuracy", RATE, NORM, SPEED, WAIT]
    assert "eld-out" not in page.read_text(encoding="utf-8")


def test_the_labels_of_a_task(tmp_path: Path) -> None:
    """Catches scores of labels, mistakes and collapsed seeds that are in results.json but not on the page."""
    folder = open_run_folder(tmp_path / "task")
    label = {name: {"mean": mean} for name, mean in (("precision", 0.5), ("recall", 0.25), ("f1", 0.333))}
    more = {
        "collapsed": {"3": ["test"]},
        "label_scores": {"validation": {}, "test": {"joy": {**label, "support": 1200}}},
        "confusions": {"validation": [], "test": [{"label": "joy", "predicted": "fear", "count": 7, "share": 0.125}]},
        "calibration": {"test": {"ece": {"values": [0.1], "mean": 0.1, "std": None, "median": 0.1}}},
    }
    write_json(folder.path / "results.json", {**RESULTS, **more})
    text = write_report(folder.path).read_text(encoding="utf-8")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert cells == [
        *("test", "accuracy", "0.8500", "0.0707", "0.8500", "0.8000, 0.9000"),
        *("test", "ece", "0.1000", "–", "0.1000", "0.1000"),
        *("joy", "0.5000", "0.2500", "0.3330", "1,200"),
        *("joy", "fear", "7", "12.5%"),
    ]
    assert "collapsed seeds, which predict the same for every row of a split: 3" in text
    write_json(folder.path / "results.json", {**RESULTS, **more, "confusions": {}})
    assert "Labels on test" in write_report(folder.path).read_text(encoding="utf-8"), "as for multi-label tasks"


@pytest.mark.parametrize(
    "damage",
    [
        *("{", "[]", '{"splits": {}}', '{"task": "a", "init": "b", "splits": {"test": 1}}'),
        '{"task": "a", "init": "b", "splits": {"test": {}}, "metric": []}',
        '{"task": "a", "init": "b", "splits": {}, "labels": 3}',
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, damage: str) -> None:
    """Catches a stack trace for a file that was edited by hand."""
    folder = run_with(tmp_path, EVENTS)
    (folder.path / "results.json").write_text(damage)
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        write_report(folder.path)


def test_a_run_without_anything_to_report_is_refused(tmp_path: Path) -> None:
    """Catches an empty report."""
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(tmp_path / "missing")
    for folder in (open_run_folder(tmp_path / "new"), run_with(tmp_path, [])):
        with pytest.raises(UserError, match="nothing to report"):
            write_report(folder.path)
        assert not folder.report.exists()


def test_sections_of_tasks_have_names(tmp_path: Path) -> None:
    """Catches sections about two runs of one task on one page, such as the demo's, that cannot be told apart."""
    runs = [open_run_folder(tmp_path / name) for name in ("random", "pretrained")]
    headings = [block.text for run in runs for block in result_blocks(run, RESULTS) if isinstance(block, Heading)]
    assert headings == ["Task: topics (random)", "Task: topics (pretrained)"]


def test_the_curves_of_the_seeds_of_a_task(tmp_path: Path) -> None:
    """Catches missing curves of a finished run, curves of another metric, and seeds that are joined."""
    events: list[dict[str, Any]] = []
    for seed, start in ((10, 0), (9, 20)):
        for step, loss, score in ((10, 3.0, 0.5), (20, 2.5, 0.7)):
            of_seed = {"seed": seed, "step": start + step}
            scores = {"eval/validation/accuracy": 0.1, "eval/validation/f1": score}
            events += [{**of_seed, "loss": loss - 1.0}, {**of_seed, "eval/validation/loss": loss, **scores}]
    folder = run_with(tmp_path, events)
    (charts,) = [block for block in training_blocks(History.of(folder), metric="f1") if isinstance(block, Charts)]
    assert [panel.title for panel in charts.panels] == ["Loss", "f1"]
    lines = [(line["label"], line["x"], line["y"]) for chart in data_of(charts)["charts"] for line in chart["lines"]]
    training = [(f"seed {seed}", [10, 20], [2.0, 1.5]) for seed in (10, 9)]
    losses, scored = ([(f"seed {seed}, validation", [10, 20], y) for seed in (10, 9)] for y in ([3.0, 2.5], [0.5, 0.7]))
    assert lines == [*training, *losses, *scored]


def test_the_highest_losses_of_long_texts(tmp_path: Path) -> None:
    """Catches a table that is left out because a text is longer than the 131,072 characters that Python's csv reads."""
    folder = open_run_folder(tmp_path / "task")
    (folder.path / "seed-1").mkdir()
    (folder.path / "seed-1" / "worst-test.csv").write_text(f"loss,text\n2.5,{'a' * 140_000}\n")
    limit = csv.field_size_limit(131_072)
    try:
        (table,) = worst_rows(folder, ["test"])
    finally:
        csv.field_size_limit(limit)
    assert table.rows == [["2.5", f"{'a' * 299}…"]]


def test_the_report_says_how_the_time_was_spent(tmp_path: Path) -> None:
    """Catches a report without the time of the attempts, or one whose shares are not of the wall clock."""
    folder = run_with(tmp_path, EVENTS)
    now = 100.0
    timer = ActivityTimer(40.0, clock=lambda: now, now=lambda: now)
    timer.open(folder, step=0, total_steps=None)
    timer.begin_training()
    now += 240.0
    timer.finish_step(1)
    with timer.during(EVALUATING):
        now += 100.0
    page = write_report(folder.path).read_text(encoding="utf-8")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    for row in (
        ["useful", "4m00s", "60.0%"],
        ["evaluating", "1m40s", "25.0%"],
        ["starting", "1m00s", "15.0%"],
        ["all", "6m40s", "100.0%"],
    ):
        assert row in [cells[at : at + 3] for at in range(len(cells))], row


def test_a_run_that_is_about_to_end_says_how(tmp_path: Path) -> None:
    """Catches a report in an artifact of W&B that says "running" forever, and one that does not say when it was so."""
    folder = run_with(tmp_path, EVENTS)
    with lock_run(folder):
        now = rf"running on {re.escape(platform.node())}, as of 20\d\d-\d\d-\d\d \d\d:\d\d UTC"
        page = write_report(folder.path).read_text(encoding="utf-8")
        assert re.search(f'<span class="state busy">{now}</span>', page)
        assert re.search(now, write_overlay([folder.path], tmp_path / "several").read_text(encoding="utf-8"))
        assert 'class="state good"' in write_report(folder.path, outcome=Outcome.DONE).read_text(encoding="utf-8")


def test_a_run_that_is_being_copied_has_a_report(tmp_path: Path) -> None:
    """Catches a report that fails because a file is cut off."""
    folder = run_with(tmp_path, EVENTS)
    folder.provenance.write_text('{"run_id": "1"')
    folder.goodput.write_text('{"start": 1')
    with folder.metrics.open("a") as file:
        file.write('{"step": 4')
    assert "provenance.json is damaged" in write_report(folder.path).read_text(encoding="utf-8")
    write_json(folder.provenance, {"run_id": "1", "ancestors": [], "attempts": [{"versions": None}]})
    assert "provenance.json is damaged" in write_report(folder.path).read_text(encoding="utf-8")
