"""`deepcloze sweep`: run each point of a grid, one after the other.

Each run is a command with a run folder of its own. OUTPUT/sweep.json keeps the config of each run, so that a restarted
sweep skips finished runs and does not mix in runs of another config. A run that a killed sweep left is waited for.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import filelock

from experiment.disk_errors import disk_errors_as, stopped_by_disk_errors
from experiment.errors import UserError, notify, reason
from experiment.files import write_json
from experiment.outcome_file import Outcome, read_outcome
from experiment.results.sweep_summary import SweepResult, read_metric, sort_results, write_summary
from experiment.run_folder import RunFolder
from experiment.signals import handle_stop_signals, interrupt
from experiment.strict_json import parse_json
from launcher.child_run import DONE, ChildRun, start, wait_for_other_process
from launcher.options import SweepOptions
from launcher.sweeps.sweep_plan import FlatConfig, SweepPlan, SweepRun, plan_sweep


class _RunRecord(TypedDict, total=False):
    config: FlatConfig
    values: Mapping[str, str]
    state: str  # as in SweepResult
    value: float | None


class _SweepRecord(TypedDict):
    """The content of sweep.json."""

    metric: str
    lower_is_better: bool
    runs: dict[str, _RunRecord]


def launch_sweep(options: SweepOptions) -> None:
    """Run a config at each point of a grid; or print the commands, for a dry run.

    Raises as `plan_sweep` and `run_sweep`, and KeyboardInterrupt for a signal while no run is running.
    """
    with handle_stop_signals(interrupt):
        plan = plan_sweep(options)
        if options.dry_run:
            print("\n".join(shlex.join(run.argv) for run in plan.runs))
        else:
            run_sweep(plan)


def run_sweep(plan: SweepPlan) -> None:
    """Run what is not finished, then write OUTPUT/sweep.{json,csv,png} and print the table.

    Raises UserError if OUTPUT has runs of other configs or is used by another sweep, StoppedError if a signal, a run's
    own STOP file or a full disk stops it early, and SystemExit if runs failed, after all others have been run.
    """
    with _lock(plan.output):
        results = _run_all(plan, _open_record(plan))
    if failed := [result.name for result in results if result.state != DONE]:
        sys.exit(f"deepcloze: sweep: {len(failed)} of {len(plan.runs)} runs failed: {', '.join(failed)}")


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """The system releases the lock when the process ends, however it ends; its runs do not hold it."""
    lock = filelock.FileLock(output / "sweep.lock")
    try:
        with disk_errors_as(UserError, "--output: "):
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"--output: another sweep is using {output}") from None
    try:
        yield
    finally:
        lock.release()


def _run_all(plan: SweepPlan, record: _SweepRecord) -> list[SweepResult]:
    results = []
    with stopped_by_disk_errors("sweep: ", "; the same command resumes"):
        for number, run in enumerate(plan.runs, start=1):
            folder = RunFolder(plan.output / run.name)
            state = _finish(run, folder, f"[{number}/{len(plan.runs)}] {run.name}")
            value = read_metric(folder, plan.metric) if state == DONE else None
            results.append(SweepResult(run.name, run.values, state, value))
            record["runs"][run.name] |= {"state": state, "value": value}
            write_json(plan.output / "sweep.json", record)
        best = sort_results(results, plan.lower_is_better)[0]
        write_json(plan.output / "sweep.json", {**record, "best": best.name if best.value is not None else None})
        write_summary(results, plan.output, plan.metric, plan.lower_is_better)
    from launcher.report import print_report  # matplotlib takes a second

    print_report("sweep", plan.output)
    return results


def _open_record(plan: SweepPlan) -> _SweepRecord:
    """Read OUTPUT/sweep.json, add the runs of this sweep and write it. Raises UserError if their configs differ."""
    path = plan.output / "sweep.json"
    known: dict[str, _RunRecord] = {}
    try:
        known = parse_json(path.read_text(encoding="utf-8"))["runs"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output: cannot read {path}: {reason(error)}") from None
    runs = dict(known)
    for run in plan.runs:
        before = known.get(run.name, {}).get("config", run.config)
        keys = sorted(key for key in {*before, *run.config} if before.get(key) != run.config.get(key))
        if keys:
            raise UserError(
                f"--output: {plan.output / run.name} was started with another {keys[0]}: {before.get(keys[0])!r}, now "
                f"{run.config.get(keys[0])!r}; choose another --output"
            )
        runs[run.name] = {**known.get(run.name, {"config": dict(run.config)}), "values": dict(run.values)}
    record: _SweepRecord = {"metric": plan.metric, "lower_is_better": plan.lower_is_better, "runs": runs}
    with disk_errors_as(UserError, "--output: "):
        write_json(path, record)
    return record


def _finish(run: SweepRun, folder: RunFolder, label: str) -> str:
    """Start or resume a run that is not done; return its state. Raises StoppedError if it was stopped."""
    child = ChildRun("sweep", label, folder, run.argv)
    wait_for_other_process(child)
    outcome = read_outcome(folder)
    if (folder.path / "results.json").is_file() or (outcome is not None and outcome.outcome is Outcome.DONE):
        notify(f"sweep: {label}: already finished")
        return DONE
    return start(child)
