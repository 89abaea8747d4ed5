"""Runs of their own that a command starts one after the other, each a command with its run folder.

A run that is in use, by the process that a killed command has left, is waited for. Stop signals are forwarded.
"""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from experiment.errors import StoppedError, notify
from experiment.outcome_file import Outcome, read_outcome
from experiment.own_process import own_environment
from experiment.run_folder import RunFolder
from experiment.run_lock import is_locked
from experiment.signals import handle_stop_signals

DONE = "done"
REJECTED = "rejected (exit code 2)"  # the user's mistake, which the run has reported

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ChildRun:
    """One run."""

    command: str  # that starts it: "sweep", for messages
    name: str  # what messages call it
    folder: RunFolder
    argv: tuple[str, ...]  # the command that starts or resumes it


def wait_for_other_process(run: ChildRun) -> None:
    """Wait while another process uses the run folder: that of a killed command, for example.

    Raises StoppedError if that process was stopped, or on a stop signal, which does not reach it.
    """
    if not is_locked(run.folder):
        return
    signals: list[int] = []
    with handle_stop_signals(signals.append):
        notify(f"{run.command}: {run.name}: waiting for the process that is using {run.folder.path}")
        while is_locked(run.folder):
            if signals:
                raise StoppedError(
                    f"{run.command}: stopped at {run.name}; the process that is using {run.folder.path} still runs"
                )
            time.sleep(_POLL_SECONDS)
    outcome = read_outcome(run.folder)
    if outcome is not None and outcome.outcome is Outcome.STOPPED:
        raise _stopped(run)


def start(run: ChildRun) -> str:
    """Run the command. Returns `DONE`, `REJECTED` or how it failed. Raises StoppedError if it was stopped."""
    notify(f"{run.command}: {run.name}: running")
    start_time = time.monotonic()
    exit_code = _run_command(run.argv)
    if exit_code not in (0, Outcome.STOPPED.exit_code) and is_locked(run.folder):
        # The process that a killed command had just started has locked the folder meanwhile.
        wait_for_other_process(run)
        exit_code = _run_command(run.argv)
    if exit_code == Outcome.STOPPED.exit_code:
        raise _stopped(run)
    state = {0: DONE, 2: REJECTED}.get(exit_code, f"failed (exit code {exit_code})")
    notify(f"{run.command}: {run.name}: {state} after {time.monotonic() - start_time:,.0f} s")
    return state


def _stopped(run: ChildRun) -> StoppedError:
    return StoppedError(f"{run.command}: stopped at {run.name}; run the same command again to resume")


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
        # A new session, so that Ctrl-C does not reach it twice.
        process = subprocess.Popen(argv, env=own_environment(), start_new_session=True)
        if signals:  # since the start
            process.send_signal(signals[0])
        exit_code = process.wait()
    return Outcome.STOPPED.exit_code if signals and exit_code != 0 else exit_code
