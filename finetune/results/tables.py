"""Tables on the terminal: the epochs of a seed; scores, mistakes, calibration and collapsed seeds of a run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiment.formatting import UNKNOWN, print_table, table_console

_LABELS = 30  # more are in results.json only
_CONFUSIONS = 3
_TITLES = {"steps": "step", "train_loss": "train loss", "validation_loss": "valid. loss"}
_FORMATS = {"epoch": ".4g", "steps": ",", "seconds": ".1f"}  # others: .4f

Describe = Callable[[Any], str]
"""The text of a score."""


def print_scores(
    title: str, splits: Mapping[str, Mapping[str, Any]], metric: str | None, describe: Describe = "{:.4f}".format
) -> None:
    """Print a row for each metric of any split, a column for each split. metric: the one to mark, if any."""
    if not splits:
        return
    rows = []
    for name in dict.fromkeys(name for scores in splits.values() for name in scores):
        cells = [describe(scores[name]) if name in scores else UNKNOWN for scores in splits.values()]
        rows.append([f"{name} *" if name == metric else name, *cells])
    print_table([title, *splits], rows)


def print_label_scores(
    title: str, labels: Mapping[str, Mapping[str, Any]], describe: Describe = "{:.4f}".format
) -> None:
    """Print a row for each label, the most frequent first."""
    rows = []
    by_support = sorted(labels.items(), key=lambda item: -item[1]["support"])
    for label, scores in by_support[:_LABELS]:
        cells = [describe(scores[name]) for name in ("precision", "recall", "f1")]
        rows.append([label, *cells, f"{scores['support']:,}"])
    if len(labels) > _LABELS:
        rows.append([f"… and {len(labels) - _LABELS} more"])
    print_table(["label", "precision", "recall", "f1", "support"], rows, title=title)


def print_epochs(console: Console, title: str, epochs: Sequence[Mapping[str, float]], best_epoch: float) -> None:
    """Losses, scores and seconds of each epoch, or of each evaluation. best_epoch: the one to mark.

    epochs: the rows of epochs.csv.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in epochs[0]:
        heading = Text(_TITLES.get(name, name.replace("_", " ")), overflow="fold")  # rich would cut it
        table.add_column(heading, justify="right")
    for row in epochs:
        cells = [format(value, _FORMATS.get(name, ".4f")) for name, value in row.items()]
        table.add_row(*cells, style="bold" if row["epoch"] == best_epoch else None)
    console.print(table, soft_wrap=False)


def print_results(results: Mapping[str, Any], path: Path) -> None:
    """Print the content of results.json: mean ± standard deviation over the seeds, if several. path: where it is."""
    count = len(results["seeds"])
    seeds = f"mean ± std of {count}" if count > 1 else f"seed {results['seeds'][0]}"
    selected = "validation" in results["splits"] and any(results["best_epochs"])
    print_scores(seeds, results["splits"], results["metric"] if selected else None, _mean_and_std)
    intervals = any("interval" in scores for split in results["splits"].values() for scores in split.values())
    legend = ["* selected the best epoch"] * selected + ["in parentheses: 95 % confidence interval"] * intervals
    if legend:
        table_console().print("; ".join(legend), soft_wrap=True)
    lines = []
    if results["label_scores"]:
        split, scores = list(results["label_scores"].items())[-1]
        print_label_scores(f"{split}, {seeds}", scores, partial(_mean_and_std, digits=3))
        lines = _describe_confusions(split, results["confusions"].get(split, ()))
    lines += [*_describe_calibration(results["calibration"]), *_describe_collapsed(results), str(path)]
    table_console().print("\n".join(lines), soft_wrap=True)


def _mean_and_std(scores: Mapping[str, Any], digits: int = 4) -> str:
    std = "" if scores["std"] is None else f" ± {scores['std']:.{digits}f}"
    cell = f"{scores['mean']:.{digits}f}{std}"
    if "interval" not in scores:
        return cell
    low, high = scores["interval"]
    return f"{cell} ({low:.{digits}f} to {high:.{digits}f})"


def _describe_confusions(split: str, confusions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe mistakes. confusions: most frequent first."""
    named = [f"{each['label']} as {each['predicted']} ({each['share']:.1%})" for each in confusions[:_CONFUSIONS]]
    return [f"most frequent mistakes on {split}: {', '.join(named)}"] if named else []


def _describe_calibration(calibration: Mapping[str, Any]) -> list[str]:
    return [
        f"calibration error on {split}: {errors['ece']['mean']:.4f}; with temperatures fitted on validation: "
        f"{errors['calibrated_ece']['mean']:.4f}"
        for split, errors in list(calibration.items())[-1:]
    ]


def _describe_collapsed(results: Mapping[str, Any]) -> list[str]:
    collapsed, seeds = results["collapsed"], results["seeds"]
    if not collapsed:
        return []
    if len(seeds) == 1:
        return [f"seed {seeds[0]} has collapsed: it predicts the same for every row of a split"]
    named = ", ".join(map(str, collapsed))
    return [
        f"{len(collapsed)} of {len(seeds)} seeds collapsed ({named}): they predict the same for every row of a split"
    ]
