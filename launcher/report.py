"""`deepcloze report`: the page of runs, sweeps and comparisons."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiment.errors import UserError, notify
from experiment.files import check_name
from experiment.results.report.pages import write_overlay, write_report
from experiment.run_files.run_folder import RunFolder, is_run, open_folder, planned_folders, runs_in
from launcher.sentence_filling import fill_new_checkpoints


def report_runs(runs: Sequence[str], output: str | None) -> Path:
    """Write the page of a run, sweep or comparison, or of several runs, with its charts as PNG files next to it; return
    its path. Raises UserError."""
    if output is not None and Path(output).is_file():
        raise UserError(f"--output: {output} is a file; expected a folder")
    default = Path("report")
    if len(runs) == 1:
        folder = open_folder(runs[0])
        if is_run(folder) or planned_folders(folder.path) or not runs_in(folder.path):
            fill_new_checkpoints(folder)
            return write_report(folder.path, output, png=True)
        default = folder.report
    return write_overlay(_logged_runs(runs), Path(output or default).absolute(), png=True)


def _logged_runs(folders: Sequence[str]) -> list[Path]:
    """Return the runs in these folders that have logged something. Prints the folders without any; raises UserError if
    none has one."""
    logged = {folder: [run for run in runs_in(folder) if _has_logged(RunFolder(run))] for folder in folders}
    if not any(logged.values()):
        raise UserError(f"{', '.join(folders)} has nothing to report: no run in it has logged anything")
    for folder, found in logged.items():
        if not found:
            notify(f"{folder} is left out: no run in it has logged anything")
    runs = [run for found in logged.values() for run in found]
    for run in runs:
        check_name(str(run))
    return runs


def _has_logged(run: RunFolder) -> bool:
    """Return whether there are events, or results: a task that is not trained has only these."""
    return run.results.exists() or (run.metrics.exists() and run.metrics.stat().st_size > 0)


def print_report(command: str, folder: Path) -> None:
    """Write the page of a sweep or comparison and print its path. A warning if it cannot be written: the runs are
    done."""
    try:
        print(write_report(folder))
    except (UserError, OSError) as error:
        notify(f"warning: {command}: no report: {error}; to write it, run: deepcloze report {shlex.quote(str(folder))}")
