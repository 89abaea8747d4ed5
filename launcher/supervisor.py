"""Runs the ranks of a launch, turns signals into a STOP file and finds out how the run ended.

DeepSpeed's launcher kills the ranks when it gets a signal and reduces most exit codes to 0 or 1. Therefore the ranks
run in a session of their own, which Ctrl-C does not reach. The first signal creates a STOP file, for which the training
loop checks. The outcome is read from the run folder, where the ranks write it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import filelock

from experiment.errors import UserError
from experiment.files import write_text
from experiment.run_folder import Outcome, RunFolder
from experiment.strict_json import parse_json
from launcher.hostfile import Slots
from launcher.signal_handlers import handle_stop_signals

# A second Ctrl-C within this time is the first one again: `timeout` and some wrappers deliver it twice.
_REPEATED_SIGNAL_SECONDS = 1.0
# DeepSpeed's launcher gives ranks 30 s to exit after one of them failed or it got a signal.
_EXIT_TIMEOUT_SECONDS = 40.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class LaunchResult:
    """How a launch ended."""

    outcome: Outcome
    message: str = ""


def supervise(folder: RunFolder, argv: Sequence[str], environment: Mapping[str, str], slots: Slots) -> LaunchResult:
    """Run `argv` (a `deepspeed` command) until all its processes have exited, and record it in `RUN/launch.jsonl`.

    On SIGTERM, SIGHUP or Ctrl-C the ranks save a checkpoint and exit; a second Ctrl-C kills them. No rank outlives this
    process. Raises UserError if another launch uses the run folder.
    """
    with _lock(folder):
        folder.outcome.unlink(missing_ok=True)
        if folder.stop.exists():
            folder.stop.unlink()
            _notify(f"removed {folder.stop}, which is older than this launch")
        attempts = _read_attempts(folder)
        record: dict[str, object] = {
            "attempt": len(attempts) + 1,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "hosts": {host: list(numbers) for host, numbers in slots.items()},
            "argv": list(argv),
            "outcome": None,  # remains null if this process is killed
            "exit": None,
        }
        _write_attempts(folder, [*attempts, record])
        result = _run_deepspeed(folder, argv, environment)
        record |= {"outcome": result.outcome.value, "exit": result.outcome.exit_code}
        _write_attempts(folder, [*attempts, record])
        return result


def _run_deepspeed(folder: RunFolder, argv: Sequence[str], environment: Mapping[str, str]) -> LaunchResult:
    start_time = time.time()
    with _stop_file_on_signal(folder) as stop:
        process = subprocess.Popen(argv, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            with _watchdog(process.pid):
                stop.kill = lambda: _kill_group(process.pid)
                exit_code = process.wait()
                _wait_for_group(process.pid)
        finally:
            _kill_group(process.pid)
    reported = folder.read_outcome()
    killed = _describe_kill(exit_code)
    if reported is not None:
        outcome, message = reported
        # The other ranks only know that they lost their peer, not why.
        if killed and outcome is Outcome.FAILED:
            message = f"a rank was {killed}; {message}"
        return LaunchResult(outcome, message)
    if stop.killed:
        return LaunchResult(Outcome.STOPPED, "killed; the run can resume from its last complete checkpoint")
    return LaunchResult(Outcome.FAILED, _failure_message(folder, killed or f"exit code {exit_code}", start_time))


@dataclass
class _Stop:
    """What signals have requested so far."""

    kill: Callable[[], None]
    requested_at: float | None = None  # time.monotonic() of the first signal
    killed: bool = False


@contextmanager
def _stop_file_on_signal(folder: RunFolder) -> Iterator[_Stop]:
    """Create RUN/STOP on the first signal and kill the ranks on a later Ctrl-C. The STOP file is removed on exit."""
    stop = _Stop(kill=lambda: None)

    def on_signal(number: int) -> None:
        if stop.requested_at is None:
            stop.requested_at = time.monotonic()
            folder.stop.touch()
            _notify("stopping: the ranks save a checkpoint and exit; press Ctrl-C again to kill them")
        elif number == signal.SIGINT and time.monotonic() - stop.requested_at > _REPEATED_SIGNAL_SECONDS:
            stop.killed = True
            stop.kill()

    try:
        with handle_stop_signals(on_signal):
            yield stop
    finally:
        if stop.requested_at is not None:
            folder.stop.unlink(missing_ok=True)


@contextmanager
def _watchdog(group: int) -> Iterator[None]:
    """Kill the process group if this process dies, even by SIGKILL.

    A second process waits on a pipe, which closes when this process exits.
    """
    shell = 'read -r _; kill -s KILL -- "-$0"'
    watchdog = subprocess.Popen(["sh", "-c", shell, str(group)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watchdog.kill()
        watchdog.communicate()


@contextmanager
def _lock(folder: RunFolder) -> Iterator[None]:
    lock = filelock.FileLock(folder.logs / "launch.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"run.dir: another deepcloze process is using {folder.path}") from None
    try:
        yield
    finally:
        lock.release()


def _wait_for_group(group: int) -> None:
    """Wait until the process group is empty, or time out: DeepSpeed's launcher may exit before the ranks do."""
    deadline = time.monotonic() + _EXIT_TIMEOUT_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _describe_kill(exit_code: int) -> str | None:
    """'killed by SIGNAL' if the exit code means that a signal ended the process or, as 256 - signal, a rank."""
    number = -exit_code if exit_code < 0 else 256 - exit_code
    if not 0 < number < signal.NSIG:
        return None
    reason = ", possibly because the system ran out of memory" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{reason}"


def _failure_message(folder: RunFolder, reason: str, start_time: float) -> str:
    """The message for ranks that exited without writing an outcome, with the end of the failed rank's log."""
    message = f"the ranks exited without reporting an outcome ({reason}); their logs are in {folder.logs}"
    logs = [path for path in sorted(folder.logs.glob("rank-*.log")) if path.stat().st_mtime >= start_time]
    tails = {path: _tail(path) for path in logs}
    if not tails:
        return message
    # The failed rank stops logging first; the others notice its loss later.
    failed = [path for path, tail in tails.items() if "Traceback" in tail]
    path = min(failed, key=_modified_ns) if failed else max(tails, key=_modified_ns)
    return f"{message}\nthe end of {path.name}:\n{tails[path]}"


def _modified_ns(path: Path) -> int:
    return path.stat().st_mtime_ns


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])


def _read_attempts(folder: RunFolder) -> list[dict[str, object]]:
    """The launches so far. Skips what a full disk or a power cut left of a line, and says so."""
    try:
        lines = folder.launches.read_bytes().split(b"\n")  # not str.splitlines, which also splits at U+2028 and others
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"run.dir: cannot read {folder.launches}: {error.strerror}") from None
    attempts = list(map(_attempt, filter(None, lines)))
    if damaged := attempts.count(None):
        _notify(f"{folder.launches} is damaged: removed {damaged} of its {len(attempts)} lines")
    return [attempt for attempt in attempts if attempt is not None]


def _attempt(line: bytes) -> dict[str, object] | None:
    try:
        attempt = parse_json(line)
    except (ValueError, RecursionError):
        return None
    return attempt if isinstance(attempt, dict) else None


def _write_attempts(folder: RunFolder, attempts: Sequence[Mapping[str, object]]) -> None:
    write_text(folder.launches, "".join(json.dumps(attempt, ensure_ascii=False) + "\n" for attempt in attempts))


def _notify(message: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(f"deepcloze: {message}", file=sys.stderr, flush=True)
