"""What a finished run prints on stdout: scores, scores of labels, frequent mistakes, calibration, collapsed seeds."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiment.results.report.values import UNKNOWN
from finetune.results.score_table import print_label_scores, print_scores

_CONFUSIONS = 3


def print_results(results: Mapping[str, Any], path: Path) -> None:
    """Print the content of results.json: mean ± standard deviation over the seeds. path: where it is."""
    seeds = f"mean ± std of {len(results['seeds'])}"
    selected = "validation" in results["splits"] and any(results["best_epochs"])
    print_scores(seeds, results["splits"], results["metric"] if selected else None, _mean_and_std)
    intervals = any("interval" in scores for split in results["splits"].values() for scores in split.values())
    legend = ["* selected the best epoch"] * selected + ["in parentheses: 95 % confidence interval"] * intervals
    lines = ["; ".join(legend)] if legend else []
    if results["label_scores"]:
        split, scores = list(results["label_scores"].items())[-1]
        print_label_scores(f"{split}, {seeds}", scores, partial(_mean_and_std, digits=3))
        lines += _describe_confusions(split, results["confusions"].get(split, ()))
    lines += [*_describe_calibration(results["calibration"]), *_describe_collapsed(results), str(path)]
    Console().print("\n".join(lines), markup=False, soft_wrap=True, highlight=False)


def _mean_and_std(scores: Mapping[str, Any], digits: int = 4) -> str:
    std = UNKNOWN if scores["std"] is None else f"{scores['std']:.{digits}f}"
    cell = f"{scores['mean']:.{digits}f} ± {std}"
    if "interval" not in scores:
        return cell
    low, high = scores["interval"]
    return f"{cell} ({low:.{digits}f} to {high:.{digits}f})"


def _describe_confusions(split: str, confusions: Sequence[Mapping[str, Any]]) -> list[str]:
    """confusions: most frequent first."""
    named = [f"{each['label']} as {each['predicted']} ({each['share']:.1%})" for each in confusions[:_CONFUSIONS]]
    return [f"most frequent mistakes on {split}: {', '.join(named)}"] if named else []


def _describe_calibration(calibration: Mapping[str, Any]) -> list[str]:
    """The calibration error on the last split."""
    return [
        f"calibration error on {split}: {errors['ece']['mean']:.4f}; with temperatures fitted on validation: "
        f"{errors['calibrated_ece']['mean']:.4f}"
        for split, errors in list(calibration.items())[-1:]
    ]


def _describe_collapsed(results: Mapping[str, Any]) -> list[str]:
    collapsed, seeds = results["collapsed"], results["seeds"]
    if not collapsed:
        return []
    named = ", ".join(map(str, collapsed))
    return [
        f"{len(collapsed)} of {len(seeds)} seeds collapsed ({named}): they predict the same for every row of a split"
    ]
