"""The score of a fine-tuning run that `deepcloze status` and reports show, and how many seeds have collapsed."""

from collections.abc import Mapping
from typing import Any


def main_score(results: Mapping[str, Any]) -> tuple[str, float, float | None] | None:
    """Return the primary metric on the last split that has it: the split, mean and standard deviation over the seeds.
    results: of results.json."""
    metric = results.get("metric")
    scored = [(split, scores[metric]) for split, scores in results["splits"].items() if metric in scores]
    return (scored[-1][0], scored[-1][1]["mean"], scored[-1][1]["std"]) if scored else None


def count_collapsed(results: Mapping[str, Any], split: str) -> int:
    """Return how many seeds predict the same for every row of a split. results: of results.json."""
    collapsed = results["collapsed"]
    if isinstance(collapsed, list):  # of earlier versions: seeds that have collapsed on any split
        return len(collapsed)
    return sum(split in splits for splits in collapsed.values())
