"""The report of a run, a sweep or a comparison, or of several runs: one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from experiment.errors import UserError, notify, readable_disk_errors
from experiment.formatting import counted
from experiment.results.history import NO_AXIS
from experiment.results.page import PAGE, Block, Code, Heading, Page, write_page
from experiment.results.report.run import OpenRuns, Run, open_run, open_runs
from experiment.results.report.run_facts import goodput_blocks, provenance_blocks, task_headline, training_headline
from experiment.results.report.several_runs import compare_blocks, name_runs, overlay_blocks, sweep_blocks
from experiment.results.report.tasks import downstream_blocks, result_blocks
from experiment.results.report.training import filling_blocks, read_marks, training_blocks
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder, open_folder
from experiment.run_files.run_life import Life


def write_report(
    run: str | Path, output: str | Path | None = None, outcome: Outcome | None = None, png: bool = False
) -> Path:
    """Write index.html to `output`, by default RUN/report; return its path.

    `outcome`: how the run that calls this is about to end; by default, as the files of the run say. `png`: write
    the charts next to the page, too.

    Raises UserError if the folder has no run, sweep or comparison, or nothing has been logged yet.
    """
    folder = open_folder(run)
    life = None if outcome is None else Life(outcome.value)
    if (page := set_page(folder, open_runs)) is None:
        opened = open_run(folder.path.name, folder, life)
        if not (blocks := run_blocks(opened)):
            raise UserError(
                f"{folder.path} has nothing to report: neither results.json, sweep.json, compare.json nor an event in "
                f"{folder.metrics.name}"
            )
        page = run_page(opened, blocks)
    return _write(folder.report if output is None else Path(output).absolute(), page, png)


def write_overlay(runs: Sequence[str | Path], directory: Path, png: bool = False) -> Path:
    """Write a page about several runs to `directory`; return its path. Runs with nothing to report are left out, with a
    warning. Raises UserError if none is left."""
    shown = []
    for run in open_runs(name_runs([open_folder(run).path for run in dict.fromkeys(runs)])):
        if run.history.seeds or run.results is not None:
            shown.append(run)
        else:
            notify(f"warning: {run.name} is left out: no complete event in {run.folder.metrics.name}")
    if not shown:
        raise UserError("none of these runs has anything to report")
    configs = [
        Code(f"{run.name}: config.yaml", run.folder.config.read_text(encoding="utf-8", errors="replace"))
        for run in shown
        if run.folder.config.is_file()
    ]
    blocks = [*overlay_blocks(shown), Heading("Configs"), *configs]
    return _write(directory, Page(counted(len(shown), "run"), blocks), png)


def _write(directory: Path, page: Page, png: bool) -> Path:
    with readable_disk_errors(writes=True):
        path = write_page(directory / PAGE, page)
        if png:
            from experiment.results.plots import draw_charts  # imports matplotlib

            draw_charts(directory, page.blocks)
    return path


def set_page(folder: RunFolder, open_runs: OpenRuns) -> Page | None:
    """Return the page of a sweep or comparison; None for another folder. Raises UserError for damaged files."""
    blocks = [*compare_blocks(folder, open_runs), *sweep_blocks(folder, open_runs)]
    return Page(folder.path.name, [*blocks, *provenance_blocks(folder)]) if blocks else None


def run_blocks(run: Run) -> list[Block]:
    """Return the blocks of a run's report; empty if there is nothing to report yet."""
    blocks: list[Block] = []
    metric = None
    if run.results is not None:
        blocks += result_blocks(run.folder, run.results)
        metric = str(run.results.get("metric"))
    blocks += training_blocks(run.history, read_marks(run), metric)
    axis = next((seed.axis for seed in run.history.seeds.values()), NO_AXIS)
    return [*blocks, *downstream_blocks(run.folder, axis), *filling_blocks(run.folder), *goodput_blocks(run)]


def run_page(run: Run, blocks: Sequence[Block]) -> Page:
    """Make the page of a run. blocks: of `run_blocks`."""
    if run.results is None or (run.life is not None and run.life.state == "running"):
        headline = training_headline(run)
    else:
        headline = task_headline(run, run.results)
    return Page(run.folder.path.name, [*blocks, *provenance_blocks(run.folder)], headline)
