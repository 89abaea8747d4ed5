"""`deepcloze report`: what new checkpoints fill into held-out sentences, then the page."""

from collections.abc import Sequence
from pathlib import Path

from experiment.results.report import open_folder, write_overlay, write_report
from launcher.fillings import fill_new_checkpoints


def report_runs(runs: Sequence[str], output: str | None) -> Path:
    """Write the page of a run, sweep or comparison, or of several runs; return its path. Raises UserError."""
    if len(runs) > 1:
        return write_overlay(runs, Path(output or "report").absolute())
    fill_new_checkpoints(open_folder(runs[0]))
    return write_report(runs[0], output)
