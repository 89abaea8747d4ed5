"""The score of a fine-tuning run that `deepcloze status` and reports show."""

from collections.abc import Mapping
from typing import Any


def main_score(results: Mapping[str, Any]) -> tuple[str, float, float | None] | None:
    """Return the primary metric on the last split that has it: the split, mean and standard deviation over the seeds.
    results: of results.json."""
    metric = results.get("metric")
    scored = [(split, scores[metric]) for split, scores in results["splits"].items() if metric in scores]
    return (scored[-1][0], scored[-1][1]["mean"], scored[-1][1]["std"]) if scored else None
