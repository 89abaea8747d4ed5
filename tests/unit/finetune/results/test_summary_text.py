from pathlib import Path
from typing import Any

import pytest

from finetune.results.summary_text import print_results


def results(splits: list[str], best_epoch: int, **score: Any) -> dict[str, Any]:
    scores = {"accuracy": {"mean": 0.5, "std": None, **score}}
    nothing: dict[str, Any] = {"label_scores": {}, "confusions": {}, "calibration": {}, "collapsed": []}
    found = {"seeds": [1], "metric": "accuracy", "best_epochs": [best_epoch]}
    return {**nothing, **found, "splits": dict.fromkeys(splits, scores)}


@pytest.mark.parametrize(
    ("splits", "best_epoch", "selected"),
    [(["validation", "test"], 2, True), (["test"], 2, False), (["validation", "test"], 0, False)],
    ids=["trained", "fit_on train+validation", "zero-shot"],
)
@pytest.mark.parametrize("interval", [None, [0.4, 0.6]])
def test_the_legend_fits_the_table(
    splits: list[str], best_epoch: int, selected: bool, interval: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a metric that is said to have selected an epoch where there was nothing to select by."""
    score = {} if interval is None else {"interval": interval}
    print_results(results(splits, best_epoch, **score), Path("results.json"))
    out = capsys.readouterr().out
    assert ("* selected the best epoch" in out) == ("accuracy *" in out) == selected
    assert ("95 % confidence interval" in out) == (interval is not None)
