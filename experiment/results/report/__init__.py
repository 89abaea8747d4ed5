"""The report of a run, a sweep or a comparison, or of several runs: one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from experiment.errors import UserError
from experiment.goodput import read_goodput
from experiment.outcome_file import Outcome
from experiment.results.charts import x_axis
from experiment.results.fillings import filling_blocks
from experiment.results.page import PAGE, Block, Code, Heading, Headline, write_page
from experiment.results.report.run_facts import (
    goodput_blocks,
    pretraining_headline,
    provenance_blocks,
    read_run_config,
    task_headline,
)
from experiment.results.report.several_runs import compare_blocks, name_runs, open_runs, overlay_blocks, sweep_blocks
from experiment.results.report.tasks import downstream_blocks, read_task_results, result_blocks
from experiment.results.report.training import read_marks, training_blocks
from experiment.run_folder import RunFolder
from experiment.run_life import Life, read_life
from experiment.tracking.jsonl import read_events


def write_report(
    run: str | Path, output: str | Path | None = None, outcome: Outcome | None = None, png: bool = False
) -> Path:
    """Write index.html to `output`, by default RUN/report; return its path.

    `outcome`: how the run that calls this is about to end; by default, what the files of the run say. `png`: write
    the charts next to the page, too.

    Raises UserError if the folder is not that of a run, sweep or comparison, or nothing has been logged yet.
    """
    folder = open_folder(run)
    directory = folder.report if output is None else Path(output).absolute()
    headline, blocks = _run_page(folder, outcome)
    if not blocks:
        raise UserError(
            f"{folder.path} has nothing to report: neither results.json, sweep.json, compare.json nor an event in "
            f"{folder.metrics.name}"
        )
    page = write_page(directory / PAGE, folder.path.name, [*blocks, *provenance_blocks(folder)], headline)
    return _with_charts(page, blocks, png)


def write_overlay(runs: Sequence[str | Path], directory: Path, png: bool = False) -> Path:
    """Write a page about several runs to `directory`; return its path. Raises UserError as `write_report`."""
    opened = open_runs(name_runs([open_folder(run).path for run in dict.fromkeys(runs)]))
    for run in opened:
        if not run.events:
            raise UserError(f"{run.folder.path} has nothing to report: no event in {run.folder.metrics.name}")
    blocks = overlay_blocks(opened)
    configs: list[Block] = [
        Heading("Configs"),
        *(
            Code(f"{run.name}: config.yaml", run.folder.config.read_text(encoding="utf-8", errors="replace"))
            for run in opened
            if run.folder.config.is_file()
        ),
    ]
    return _with_charts(write_page(directory / PAGE, f"{len(opened)} runs", [*blocks, *configs]), blocks, png)


def _with_charts(page: Path, blocks: Sequence[Block], png: bool) -> Path:
    if png:
        from experiment.results.plots import draw_charts  # imports matplotlib

        draw_charts(page.parent, blocks)
    return page


def open_folder(run: str | Path) -> RunFolder:
    """Raises UserError if there is no such folder."""
    folder = RunFolder(Path(run).absolute())
    if not folder.path.is_dir():
        raise UserError(f"there is no run folder {folder.path}")
    return folder


def _run_page(folder: RunFolder, outcome: Outcome | None) -> tuple[Headline | None, list[Block]]:
    """Without blocks if there is nothing to report."""
    together = [*compare_blocks(folder), *sweep_blocks(folder)]
    if together:
        return None, together
    results, events, goodput = read_task_results(folder), read_events(folder.metrics), read_goodput(folder)
    blocks: list[Block] = []
    if results is not None:
        blocks += result_blocks(folder, results)
    marks = read_marks(folder, read_run_config(folder))
    # Of fine-tuning, the results show the evaluations of each seed.
    blocks += training_blocks(folder, held_out=results is None, marks=marks)
    blocks += downstream_blocks(folder, x_axis(events))
    blocks += [*filling_blocks(folder), *goodput_blocks(goodput)]
    if results is not None:
        return task_headline(results), blocks
    life = read_life(folder) if outcome is None else Life(outcome.value)
    return pretraining_headline(folder, events, goodput, life), blocks
