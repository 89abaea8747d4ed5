import csv
import json
import math
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.results.sweep_summary import (
    SweepResult,
    read_metric,
    read_sweep_results,
    sort_results,
    sweep_charts,
    write_summary,
)
from experiment.run_files.run_folder import RunFolder


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, 1.0), (False, 3.0)])
def test_best_first(lower_is_better: bool, best: float) -> None:
    """Catches a reversed table, and runs without a value at its top."""
    results = [SweepResult("a", {}, "done", value) for value in (2.0, None, 3.0, 1.0)]
    best_first = [result.value for result in sort_results(results, lower_is_better)]
    assert (best_first[0], best_first[-1]) == (best, None)


def test_points_of_a_grid_have_a_row_each() -> None:
    """Catches points of a large grid that share a line, and a chart that fails for a run without a finite value."""
    values = {"lr=1 rate=1": 2.0, "lr=1 rate=2": 3.0, "diverged": math.inf, "failed": None}
    results = [SweepResult(name, {}, "done", value) for name, value in values.items()]
    (chart,) = sweep_charts(results, "loss")
    assert [(dots.label, dots.mean) for dots in chart.rows] == [("lr=1 rate=1", 2.0), ("lr=1 rate=2", 3.0)]
    assert sweep_charts(results[2:], "loss") == []


def test_results_of_fine_tuning(tmp_path: Path) -> None:
    """Catches a comparison by another split or metric than requested."""
    results = {"splits": {"validation": {"macro_f1": {"mean": 0.5}}, "test": {"macro_f1": {"mean": 0.7}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_metric(RunFolder(tmp_path), "macro_f1") == 0.5
    assert read_metric(RunFolder(tmp_path), "accuracy") is None


@pytest.mark.parametrize(("events", "value"), [([3.0, 2.0], 2.0), ([2.0, None], None), ([], None)])
def test_the_last_value_of_pretraining(tmp_path: Path, events: list[float | None], value: float | None) -> None:
    """Catches a run that has diverged and is listed with an earlier, better value."""
    lines = [{"step": step, "eval/wiki/perplexity": found} for step, found in enumerate(events)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 9}]))
    assert read_metric(RunFolder(tmp_path), "eval/wiki/perplexity") == value


@pytest.mark.parametrize(
    ("events", "value"), [([3.0, 1.0, 2.0], 1.0), ([2.0, 1.0, None], 1.0), ([None], None), ([], None)]
)
def test_the_best_value_of_pretraining(tmp_path: Path, events: list[float | None], value: float | None) -> None:
    """Catches a run that is listed with a later, worse value than that of the best checkpoint, which it has kept."""
    lines = [{"step": step, "eval/wiki/loss": found} for step, found in enumerate(events)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_metric(RunFolder(tmp_path), "eval/wiki/loss", lower_is_better=True) == value


def test_an_interval_of_skipped_batches_has_no_loss(tmp_path: Path) -> None:
    """Catches a run without a value because it skipped the batches of its last interval."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 100, "loss": 2.0}\n{"step": 101, "loss": null}\n')
    assert read_metric(RunFolder(tmp_path), "loss") == 2.0


@pytest.mark.parametrize("content", ["", '{"splits": {"valid', "[]", '{"splits": {}}', '{"splits": {"validation": 1}}'])
def test_damaged_results_of_fine_tuning(tmp_path: Path, content: str) -> None:
    """Catches a traceback at the restart of a sweep with a finished run that was damaged."""
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=f"results.json is damaged: .*delete {tmp_path}"):
        read_metric(RunFolder(tmp_path), "macro_f1")


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ('{"collapsed": {}, "seeds": [7, 8, 9]}', "0.5000"),
        ('{"collapsed": {"7": ["test"]}, "seeds": [7, 8, 9]}', "0.5000"),
        (
            '{"collapsed": {"7": ["validation"], "9": ["validation", "test"]}, "seeds": [7, 8, 9]}',
            "0.5000 (2 of 3 seeds collapsed)",
        ),
        ('{"collapsed": [7, 9], "seeds": [7, 8, 9]}', "0.5000 (2 of 3 seeds collapsed)"),
        ('{"splits": ', "0.5000"),
        (None, "0.5000"),
    ],
)
def test_collapsed_seeds_are_marked(tmp_path: Path, content: str | None, shown: str) -> None:
    """Catches a table in which a point looks worse, or even best, because its seeds predict one label, but not for a
    small test split; and a traceback for runs that pretrain, and for damaged results."""
    folder = RunFolder(tmp_path / "lr=1")
    folder.path.mkdir()
    if content is not None:
        folder.results.write_text(content)
    runs = {"lr=1": {"values": {"lr": "1"}, "state": "done", "value": 0.5}}
    (result,) = read_sweep_results(RunFolder(tmp_path), runs, "f1")
    assert result.shown() == shown


def test_the_spread_of_several_seeds_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a best point that is one by chance, because the table and the chart show the mean of its seeds only."""
    folder = RunFolder(tmp_path / "lr=1")
    folder.path.mkdir()
    scores = {"f1": {"values": [0.4, 0.6], "mean": 0.5, "std": 0.1414}}
    folder.results.write_text(json.dumps({"collapsed": {}, "seeds": [7, 8], "splits": {"validation": scores}}))
    runs = {"lr=1": {"values": {"lr": "1"}, "state": "done", "value": 0.5}}
    results = read_sweep_results(RunFolder(tmp_path), runs, "f1")
    assert [dots.values for dots in sweep_charts(results, "f1")[0].rows] == [[0.4, 0.6]]
    write_summary(sort_results(results, lower_is_better=False), tmp_path, "f1")
    assert "0.5000 ± 0.1414" in capsys.readouterr().out
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["std"] for row in csv.DictReader(file)] == ["0.1414"]


def test_collapsed_seeds_are_counted_in_the_csv(tmp_path: Path) -> None:
    """Catches scripts that choose a point whose seeds predict one label, a 0 for pretraining, which has no such seeds,
    and for a point that failed with the seeds that were added, whose earlier results are still there."""
    values = {1: 1.0, 2: 0.5, 3: 0.3, 4: None}
    runs = {f"lr={lr}": {"values": {"lr": str(lr)}, "value": value} for lr, value in values.items()}
    for lr, collapsed in ((1, {"7": ["validation"]}), (2, {}), (4, {})):
        folder = RunFolder(tmp_path / f"lr={lr}")
        folder.path.mkdir()
        folder.results.write_text(json.dumps({"collapsed": collapsed, "seeds": [7, 8, 9]}))
    write_summary(read_sweep_results(RunFolder(tmp_path), runs, "f1"), tmp_path, "f1")
    with (tmp_path / "sweep.csv").open() as file:
        counts = {row["lr"]: row["collapsed"] for row in csv.DictReader(file)}
    assert counts == {"1": "1", "2": "0", "3": "", "4": ""}
