"""Runs the ranks of a launch and turns signals into a STOP file.

DeepSpeed's launcher kills the ranks when it gets a signal and reduces most exit codes to 0 or 1. Therefore the ranks
run in a session of their own, which Ctrl-C does not reach. The first signal creates a STOP file, for which the training
loop checks. The outcome is read from the run folder, where the ranks write it (`launch_result`).
"""

import errno
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

from experiment.disk_errors import describe_disk_error
from experiment.errors import UserError
from experiment.files import write_text
from experiment.outcome_file import Outcome, read_outcome, reserve_outcome
from experiment.run_folder import RunFolder
from experiment.run_lock import lock_run
from experiment.strict_json import parse_json
from launcher.hostfile import Slots
from launcher.launch_result import LaunchResult, clear_reports, read_result
from launcher.placement import is_local
from launcher.signal_handlers import handle_stop_signals

# A second Ctrl-C within this time is the first one again: `timeout` and some wrappers deliver it twice.
_REPEATED_SIGNAL_SECONDS = 1.0
# DeepSpeed's launcher gives ranks 30 s to exit after one of them failed or it got a signal.
_EXIT_TIMEOUT_SECONDS = 40.0
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def supervise(
    folder: RunFolder, argv: Sequence[str], environment: Mapping[str, str], slots: Slots, start_time: float
) -> LaunchResult:
    """Run `argv` (a `deepspeed` command) until all its processes have exited, and record it in `RUN/launch.jsonl`.

    `start_time`: `time.time()` when the user started the launch. A STOP file that is older is removed; a newer one was
    created while the launch was checked, and nothing is started.

    On SIGTERM, SIGHUP or Ctrl-C the ranks save a checkpoint and exit; a second Ctrl-C kills them. No rank outlives this
    process. Raises UserError if another launch uses the run folder, OSError if it cannot be written.
    """
    with lock_run(folder):
        clear_reports(folder)
        reserve_outcome(folder)
        if folder.stop.exists() and folder.stop.stat().st_mtime < start_time:
            folder.stop.unlink()
            _notify(f"removed {folder.stop}, which is older than this launch")
        attempts = _read_attempts(folder)
        record: dict[str, object] = {
            "attempt": len(attempts) + 1,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "hosts": {host: list(numbers) for host, numbers in slots.items()},
            "argv": list(argv),
            "outcome": None,  # remains null if this process is killed, or the disk is full when it ends
            "exit": None,
        }
        _write_attempts(folder, [*attempts, record])
        if folder.stop.exists():
            result = LaunchResult(Outcome.STOPPED, f"found {folder.stop}; run the same command again to resume")
        else:
            result = _run_deepspeed(folder, argv, environment, start_time, remote=not is_local(slots))
        record |= {"outcome": result.outcome.value, "exit": result.outcome.exit_code}
        try:
            _write_attempts(folder, [*attempts, record])
        except OSError as error:
            _notify(f"cannot record how this launch ended: {describe_disk_error(error) or error}")
        return result


def _run_deepspeed(
    folder: RunFolder, argv: Sequence[str], environment: Mapping[str, str], start_time: float, remote: bool
) -> LaunchResult:
    with _stop_file_on_signal(folder) as stop:
        process = subprocess.Popen(argv, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            with _watchdog(process.pid):
                stop.kill = lambda: _kill_group(process.pid)
                if stop.killed:  # by a signal since the start
                    stop.kill()
                exit_code = process.wait()
                _wait_for_group(process.pid)
        finally:
            _kill_group(process.pid)
    reported = read_outcome(folder)
    if stop.killed and (reported is None or reported[0] is Outcome.STOPPED):
        return LaunchResult(Outcome.STOPPED, "killed; the run can resume from its last complete checkpoint")
    return read_result(folder, exit_code, start_time, remote)


@dataclass
class _Stop:
    """What signals have requested so far."""

    kill: Callable[[], None]
    requested_at: float | None = None  # time.monotonic() of the first signal
    killed: bool = False

    def kill_ranks(self) -> None:
        self.killed = True
        self.kill()


@contextmanager
def _stop_file_on_signal(folder: RunFolder) -> Iterator[_Stop]:
    """Create RUN/STOP on the first signal and kill the ranks on a later Ctrl-C, or at once if the disk takes no file.

    The STOP file is removed on exit.
    """
    stop = _Stop(kill=lambda: None)

    def on_signal(number: int) -> None:
        if stop.requested_at is None:
            stop.requested_at = time.monotonic()
            try:
                folder.stop.touch()
            except OSError as error:
                reason = describe_disk_error(error) or error
                if error.errno in _UNWRITABLE:  # no checkpoint can be saved either
                    _notify(f"killing the ranks: {reason}")
                    stop.kill_ranks()
                else:
                    stop.requested_at = None
                    _notify(f"cannot create STOP: {reason}; send the signal again")
            else:
                _notify("stopping: the ranks save a checkpoint and exit; press Ctrl-C again to kill them")
        elif number == signal.SIGINT and time.monotonic() - stop.requested_at > _REPEATED_SIGNAL_SECONDS:
            stop.kill_ranks()

    try:
        with handle_stop_signals(on_signal):
            yield stop
    finally:
        if stop.requested_at is not None:
            with suppress(OSError):  # the next launch removes it
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
