"""`deepcloze report`: the page of one run, or of several."""

from collections.abc import Sequence
from pathlib import Path

from experiment.results.report import write_overlay, write_report


def report_runs(runs: Sequence[str], output: str | None) -> Path:
    """Write the page of a run, sweep or comparison, or of several runs; return its path. Raises UserError."""
    if len(runs) > 1:
        return write_overlay(runs, Path(output or "report").absolute())
    return write_report(runs[0], output)
