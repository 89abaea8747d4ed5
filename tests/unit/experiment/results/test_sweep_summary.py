import json
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.results.sweep_summary import SweepResult, describe_collapsed, read_metric, sort_results
from experiment.run_folder import RunFolder


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, 1.0), (False, 3.0)])
def test_best_first(lower_is_better: bool, best: float) -> None:
    """Catches a reversed table, and runs without a value at its top."""
    results = [SweepResult("a", {}, "done", value) for value in (2.0, None, 3.0, 1.0)]
    best_first = [result.value for result in sort_results(results, lower_is_better)]
    assert (best_first[0], best_first[-1]) == (best, None)


def test_results_of_fine_tuning(tmp_path: Path) -> None:
    """Catches a comparison by another split or metric than requested."""
    results = {"splits": {"validation": {"macro_f1": {"mean": 0.5}}, "test": {"macro_f1": {"mean": 0.7}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_metric(RunFolder(tmp_path), "macro_f1") == 0.5
    assert read_metric(RunFolder(tmp_path), "accuracy") is None


@pytest.mark.parametrize("content", ["", '{"splits": {"valid', "[]", '{"splits": {}}', '{"splits": {"validation": 1}}'])
def test_damaged_results_of_fine_tuning(tmp_path: Path, content: str) -> None:
    """Catches a traceback at the restart of a sweep with a finished run that was damaged."""
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=f"results.json is damaged: .*delete {tmp_path}"):
        read_metric(RunFolder(tmp_path), "macro_f1")


@pytest.mark.parametrize(("collapsed", "shown"), [([], "0.5000"), ([7, 9], "0.5000 (2 of 3 seeds collapsed)")])
def test_collapsed_seeds_are_marked(tmp_path: Path, collapsed: list[int], shown: str) -> None:
    """Catches a table in which a point looks worse, or even best, because its seeds predict one label."""
    (tmp_path / "results.json").write_text(json.dumps({"collapsed": collapsed, "seeds": [7, 8, 9]}))
    assert SweepResult("a", {}, "done", 0.5, describe_collapsed(RunFolder(tmp_path))).shown() == shown


def test_nothing_is_known_of_collapsed_seeds(tmp_path: Path) -> None:
    """Catches a traceback for runs that pretrain or have not ended, and for damaged results."""
    folder = RunFolder(tmp_path)
    assert describe_collapsed(folder) == ""
    folder.results.write_text('{"splits": ')
    assert describe_collapsed(folder) == ""
