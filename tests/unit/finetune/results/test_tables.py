import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.results.tables import print_epochs, print_results


def results(splits: list[str], best_epoch: int, **score: Any) -> dict[str, Any]:
    scores = {"accuracy": {"mean": 0.5, "std": None, **score}}
    nothing: dict[str, Any] = {"label_scores": {}, "confusions": {}, "calibration": {}, "collapsed": {}}
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


def test_splits_may_have_different_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback after the training of pairs that are validated by scores."""
    splits = {"train": {"mrr": {"mean": 0.5, "std": None}}, "validation": {"spearman": {"mean": 0.25, "std": None}}}
    print_results({**results([], 1), "splits": splits}, Path("results.json"))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["mrr", "0.5000", "–"] in rows
    assert ["spearman", "–", "0.2500"] in rows


def test_the_results_of_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mean, a deviation and a count of seeds where there is one seed, and a legend below another table."""
    scores = {name: {"mean": 0.25, "std": None} for name in ("precision", "recall", "f1")}
    labels = {"test": {"low": {**scores, "support": 7}}}
    found = results(["validation", "test"], 2, interval=[0.4, 0.6])
    print_results({**found, "label_scores": labels, "collapsed": {"1": ["test"]}}, Path("results.json"))
    out = capsys.readouterr().out
    assert not any(text in out for text in ("mean", "std", "±", "–", "1 of 1"))
    assert out.count("seed 1") == 3
    assert out.index("accuracy *") < out.index("* selected the best epoch; in parentheses") < out.index("precision")
    assert out.endswith("seed 1 has collapsed: it predicts the same for every row of a split\nresults.json\n")


@pytest.mark.parametrize("train", [{}, {"train_accuracy": 0.51234}], ids=["", "score_train"])
def test_the_table_fits_a_terminal(train: dict[str, float]) -> None:
    """Catches figures that are cut or wrapped on 80 columns, which then read as other figures, and headings that are
    cut."""
    scores = dict.fromkeys(("accuracy", "macro_f1", "weighted_f1", "uar", "matthews"), 0.51234)
    losses = {"train_loss": 0.1234, "validation_loss": 12.3456}
    rows = [{"epoch": epoch, "steps": 12_345, **losses, "seconds": 1234.5, **scores, **train} for epoch in (0.5, 1)]
    text = io.StringIO()
    print_epochs(Console(file=text, width=80), "seed 7", rows, best_epoch=1)
    assert "…" not in text.getvalue()
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "seed 7"
    assert [line.split() for line in lines[-2:]] == [
        [epoch, "12,345", "0.1234", "12.3456", "1234.5", *["0.5123"] * (5 + len(train))] for epoch in ("0.5", "1")
    ]
