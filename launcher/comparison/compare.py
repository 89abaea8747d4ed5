"""`deepcloze compare`: run what a comparison consists of, one run after the other, then print one table.

Each run is a command with a run folder of its own. DIR/runs.json keeps their configs and which of them are done, so
that a restarted comparison runs each cell once and does not mix in runs of another config.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from experiment.disk_errors import stopped_by_disk_errors
from experiment.errors import UserError, notify, reason
from experiment.files import write_json
from experiment.outcome_file import Outcome, read_outcome
from experiment.run_folder import open_run_folder
from experiment.run_lock import lock_run
from experiment.signals import handle_stop_signals, interrupt
from experiment.strict_json import parse_json
from launcher.child_run import DONE, ChildRun, start, wait_for_other_process
from launcher.comparison.cell_scores import CellScores, read_cell
from launcher.comparison.compare_plan import ComparePlan, PlannedRun, Row, plan_comparison
from launcher.comparison.compare_table import write_tables
from launcher.comparison.row_tests import test_rows
from launcher.options import CompareOptions
from launcher.sweeps.sweep_plan import FlatConfig

_SEEDS = "training.seeds"  # a comparison may get more of them later


class _Record(TypedDict):
    config: FlatConfig
    state: str  # DONE, or how it failed; empty if it has not ended


def launch_comparison(options: CompareOptions) -> None:
    """Run all cells of a comparison and write its tables; or print the commands, for a dry run.

    Raises UserError for anything that would keep a run from starting, StoppedError if a signal or a full disk stops
    it early, KeyboardInterrupt for a signal while no run is running, and SystemExit if runs failed, after all others.
    """
    with handle_stop_signals(interrupt):
        plan = plan_comparison(options)
        if options.dry_run:
            print("\n".join(shlex.join(run.argv) for run in _runs(plan).values()))
        else:
            run_comparison(plan)


def run_comparison(plan: ComparePlan) -> None:
    """Run a comparison whose plan has been checked. Raises what `launch_comparison` does."""
    folder = open_run_folder(plan.folder.path)
    with lock_run(folder), stopped_by_disk_errors("compare: ", "; the same command resumes"):
        states = _Runs(plan).finish()
        cells = {row.name: _read_cells(row, states, plan.grid) for row in plan.rows}
        failed = {name: state for name, state in states.items() if state != DONE}
        write_tables(folder, cells, test_rows(cells), failed)
    if failed:
        sys.exit(f"deepcloze: compare: {len(failed)} of {len(states)} runs failed: {', '.join(failed)}")


def _runs(plan: ComparePlan) -> dict[str, PlannedRun]:
    """All runs by name, in order."""
    in_order = [run for row in plan.rows for run in (row.pretraining, *row.cells.values()) if run is not None]
    return {run.name: run for run in in_order}


def _read_cells(row: Row, states: Mapping[str, str], grid: bool) -> list[CellScores]:
    """The scores of the cells that are done."""
    return [
        cell
        for task, run in row.cells.items()
        if states[run.name] == DONE
        for cell in read_cell(task, run.folder, grid)
    ]


class _Runs:
    """The runs and their record, DIR/runs.json. Raises UserError if runs were started with other configs.

    A run without a folder has not started, or its folder was removed to run it again.
    """

    def __init__(self, plan: ComparePlan) -> None:
        self._plan = plan
        self._runs = _runs(plan)
        self._path = plan.folder.path / "runs.json"
        self._records = _read_records(self._path)
        for name, run in self._runs.items():
            known = self._records.get(name) if run.folder.path.exists() else None
            record = known or {"config": run.config, "state": ""}
            if key := _changed_key(record["config"], run.config):
                raise UserError(
                    f"run.dir: {run.folder.path} was started with another {key}: {record['config'].get(key)!r}, now "
                    f"{run.config.get(key)!r}; choose another run.dir, or remove that folder to run it again"
                )
            same = record["config"].get(_SEEDS) == run.config.get(_SEEDS)
            self._records[name] = {"config": run.config, "state": record["state"] if same else ""}

    def finish(self) -> dict[str, str]:
        """Run what is not done. Returns name -> `DONE`, or how the run failed. Raises StoppedError."""
        write_json(self._path, self._records)
        for row in self._plan.rows:
            pretrained = row.pretraining is None or self._finish(row.pretraining)
            for run in row.cells.values():
                if pretrained:
                    self._finish(run)
                else:
                    self._note(run, "not run: its pretraining failed")
        return {name: self._records[name]["state"] for name in self._runs}

    def _finish(self, run: PlannedRun) -> bool:
        """Start or resume a run that is not done; returns whether it is. Raises StoppedError if it was stopped."""
        position = list(self._runs).index(run.name) + 1
        child = ChildRun("compare", f"[{position}/{len(self._runs)}] {run.name}", run.folder, run.argv)
        wait_for_other_process(child)
        if self._records[run.name]["state"] == DONE or _is_pretrained(run):
            notify(f"compare: {child.name}: already finished")
            self._note(run, DONE)
        else:
            self._note(run, start(child))
        return self._records[run.name]["state"] == DONE

    def _note(self, run: PlannedRun, state: str) -> None:
        self._records[run.name]["state"] = state
        write_json(self._path, self._records)


def _is_pretrained(run: PlannedRun) -> bool:
    """Whether this is a pretraining that the process of a killed comparison has finished."""
    outcome = read_outcome(run.folder)
    return outcome is not None and outcome.outcome is Outcome.DONE


def _read_records(path: Path) -> dict[str, _Record]:
    try:
        records: dict[str, _Record] = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"run.dir: cannot read {path}: {reason(error)}") from None
    return records


def _changed_key(before: FlatConfig, now: FlatConfig) -> str | None:
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key) and key != _SEEDS)
    return keys[0] if keys else None
