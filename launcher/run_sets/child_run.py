"""A run as a command that is started and waited for."""

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from experiment.errors import StoppedError, notify
from experiment.process.own_process import own_environment
from experiment.process.signals import handle_stop_signals
from experiment.run_files.outcome_file import Outcome, read_outcome
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import folder_use

DONE = Outcome.DONE.value
REJECTED = "rejected (exit code 2)"  # the user's mistake, which the run has reported

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ChildRun:
    """A run to start."""

    command: str  # that starts it: "sweep", for messages
    name: str  # for messages
    folder: RunFolder
    argv: tuple[str, ...]  # the command that starts or resumes it
    shows_results: bool = True  # which it prints to stdout
    environment: Mapping[str, str] = field(default_factory=dict)  # further variables


def wait_for_other_process(run: ChildRun) -> None:
    """Wait while another process uses the run folder, such as the process of a killed command. Raises StoppedError if
    that process was stopped, or on a stop signal, which does not reach it."""
    if not folder_use(run.folder).alive:
        return
    signals: list[int] = []
    with handle_stop_signals(signals.append):
        notify(f"{run.command}: {run.name}: waiting for the process that is using {run.folder.path}")
        while folder_use(run.folder).alive:
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
    exit_code = _run_command(run)
    if exit_code not in (0, Outcome.STOPPED.exit_code) and folder_use(run.folder).alive:
        # The process that a killed command had just started has locked the folder meanwhile.
        wait_for_other_process(run)
        exit_code = _run_command(run)
    if exit_code == Outcome.STOPPED.exit_code:
        raise _stopped(run)
    return {0: DONE, 2: REJECTED}.get(exit_code, f"failed (exit code {exit_code})")


def _stopped(run: ChildRun) -> StoppedError:
    return StoppedError(f"{run.command}: stopped at {run.name}; run the same command again to resume")


def _run_command(run: ChildRun) -> int:
    """Run a command, forward stop signals to it and return its exit code. After a forwarded signal, returns the exit
    code of a stopped run, even if the command exits with 0."""
    process: subprocess.Popen[bytes] | None = None
    signals: list[int] = []

    def forward(number: int) -> None:
        signals.append(number)
        if process is not None:
            process.send_signal(number)

    with handle_stop_signals(forward):
        # A new session, so that Ctrl-C does not reach it twice.
        stdout = None if run.shows_results else subprocess.DEVNULL
        environment = {**own_environment(), **run.environment}
        process = subprocess.Popen(run.argv, env=environment, start_new_session=True, stdout=stdout)
        if signals:  # since the start
            process.send_signal(signals[0])
        exit_code = process.wait()
    return Outcome.STOPPED.exit_code if signals else exit_code
