"""`deepcloze report`: what new checkpoints fill into held-out sentences, then the page."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiment.errors import UserError, notify
from experiment.results.report import open_folder, write_overlay, write_report
from launcher.fillings import fill_new_checkpoints


def report_runs(runs: Sequence[str], output: str | None) -> Path:
    """Write the page of a run, sweep or comparison, or of several runs; return its path. Raises UserError."""
    if output is not None and Path(output).is_file():
        raise UserError(f"--output: {output} is a file; expected a folder")
    if len(runs) > 1:
        return write_overlay(runs, Path(output or "report").absolute())
    fill_new_checkpoints(open_folder(runs[0]))
    return write_report(runs[0], output)


def print_report(command: str, folder: Path) -> None:
    """Write the page of a sweep or comparison and print its path. A warning if it cannot be written: the runs are
    done."""
    try:
        print(write_report(folder))
    except (UserError, OSError) as error:
        notify(f"warning: {command}: no report: {error}; to write it, run: deepcloze report {shlex.quote(str(folder))}")
