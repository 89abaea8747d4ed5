"""`deepcloze sweep`: run each point of a grid, one after the other.

Each run is a command with a run folder of its own. OUTPUT/sweep.json keeps the config of each run, so that a restarted
sweep skips finished runs and does not mix in runs of another config. A run that a killed sweep left is waited for.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import TypedDict

import filelock

from experiment.disk_errors import disk_errors_as, stopped_by_disk_errors
from experiment.errors import StoppedError, UserError
from experiment.files import write_json
from experiment.outcome_file import Outcome, read_outcome
from experiment.results.sweep_summary import SweepResult, read_metric, write_summary
from experiment.run_folder import RunFolder
from experiment.run_lock import is_locked
from experiment.strict_json import parse_json
from launcher.messages import notify
from launcher.options import SweepOptions
from launcher.signal_handlers import handle_stop_signals, interrupt
from launcher.sweeps.sweep_plan import FlatConfig, SweepPlan, SweepRun, plan_sweep

_POLL_SECONDS = 0.5
_STOPPED_CODES = (Outcome.STOPPED.exit_code, 128 + SIGINT)


class _RunRecord(TypedDict, total=False):
    config: FlatConfig
    values: Mapping[str, str]
    state: str  # as in SweepResult
    value: float | None


class _SweepRecord(TypedDict):
    """The content of sweep.json."""

    metric: str
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
    if failed := [result.name for result in results if result.state != "done"]:
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
            value = read_metric(folder, plan.metric) if state == "done" else None
            results.append(SweepResult(run.name, run.values, state, value))
            record["runs"][run.name] |= {"state": state, "value": value}
            write_json(plan.output / "sweep.json", record)
        write_summary(results, plan.output, plan.metric, plan.lower_is_better)
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
        raise UserError(f"--output: cannot read {path}: {error}") from None
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
    record: _SweepRecord = {"metric": plan.metric, "runs": runs}
    with disk_errors_as(UserError, "--output: "):
        write_json(path, record)
    return record


def _finish(run: SweepRun, folder: RunFolder, label: str) -> str:
    """Start or resume a run that is not done; return its state. Raises StoppedError if it was stopped."""
    waited = _wait_for_other_process(folder, label)
    outcome = read_outcome(folder)
    if (folder.path / "results.json").is_file() or (outcome is not None and outcome[0] is Outcome.DONE):
        notify(f"sweep: {label}: already finished")
        return "done"
    stopped = StoppedError(f"sweep: stopped at {label}; run the same command again to resume")
    if waited and outcome is not None and outcome[0] is Outcome.STOPPED:
        raise stopped
    notify(f"sweep: {label}: running")
    start_time = time.monotonic()
    exit_code = _run_command(run.argv)
    if exit_code in _STOPPED_CODES:
        raise stopped
    state = "done" if exit_code == 0 else f"failed (exit code {exit_code})"
    notify(f"sweep: {label}: {state} after {time.monotonic() - start_time:,.0f} s")
    return state


def _wait_for_other_process(folder: RunFolder, label: str) -> bool:
    """Wait while another process uses the run folder: that of a killed sweep, for example. Returns whether one did.

    Raises StoppedError on a stop signal, which does not reach that process.
    """
    if not is_locked(folder):
        return False
    signals: list[int] = []
    with handle_stop_signals(signals.append):
        notify(f"sweep: {label}: waiting for the process that is using {folder.path}")
        while is_locked(folder):
            if signals:
                raise StoppedError(f"sweep: stopped at {label}; the process that is using {folder.path} still runs")
            time.sleep(_POLL_SECONDS)
    return True


def _run_command(argv: Sequence[str]) -> int:
    """Run a command, forward stop signals to it and return its exit code.

    A command that fails after a forwarded signal counts as stopped.
    """
    process: subprocess.Popen[bytes] | None = None
    signals: list[int] = []

    def forward(number: int) -> None:
        signals.append(number)
        if process is not None:
            process.send_signal(number)

    with handle_stop_signals(forward):
        process = subprocess.Popen(argv, start_new_session=True)  # so that Ctrl-C does not reach it twice
        if signals:  # since the start
            process.send_signal(signals[0])
        exit_code = process.wait()
    return Outcome.STOPPED.exit_code if signals and exit_code != 0 else exit_code
