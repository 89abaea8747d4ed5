"""Runs the ranks of a launch, passes on the wish to stop, and finds out how they ended.

DeepSpeed's launcher answers a signal by killing the ranks and may turn any ending into 0 or 1. So the ranks run in a
session of their own, where no Ctrl-C reaches them; the first signal becomes a STOP file, which the training loop looks
for; and what the ranks agreed on is read from the run folder.
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
from types import FrameType

import filelock

from experiment.errors import UserError
from experiment.files import write_text
from experiment.run_folder import Outcome, RunFolder
from launcher.hostfile import Slots

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and some wrappers deliver one Ctrl-C twice.
_IMPATIENCE_SECONDS = 1.0
# DeepSpeed's launcher gives ranks 30 s to end when one of them failed or it got a signal itself.
_GRACE_SECONDS = 40.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, with what there is to say about it."""

    outcome: Outcome
    message: str = ""


def run_attempt(folder: RunFolder, argv: Sequence[str], environment: Mapping[str, str], slots: Slots) -> Ending:
    """Run `argv` (a `deepspeed` command) until all its processes have ended; `RUN/launch.jsonl` gets a line about it.

    SIGTERM, SIGHUP or Ctrl-C make the ranks save and end; another Ctrl-C ends them at once. No rank outlives this
    process. Raises UserError where another launch is at work in the run folder.
    """
    with _sole_launch(folder):
        folder.outcome.unlink(missing_ok=True)
        if folder.stop.exists():
            folder.stop.unlink()
            _tell(f"removed {folder.stop}, left from before this launch")
        attempts = _read_attempts(folder)
        record: dict[str, object] = {
            "attempt": len(attempts) + 1,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "hosts": {host: list(numbers) for host, numbers in slots.items()},
            "argv": list(argv),
            "outcome": None,  # stays so if this process is killed
            "exit": None,
        }
        _write_attempts(folder, [*attempts, record])
        ending = _run(folder, argv, environment)
        record |= {"outcome": ending.outcome.value, "exit": ending.outcome.exit_code}
        _write_attempts(folder, [*attempts, record])
        return ending


def _run(folder: RunFolder, argv: Sequence[str], environment: Mapping[str, str]) -> Ending:
    began = time.time()
    with _signals_as_stop(folder) as stop:
        process = subprocess.Popen(argv, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            with _watchdog(process.pid):
                stop.end_at_once = lambda: _kill_group(process.pid)
                code = process.wait()
                _await_group(process.pid)
        finally:
            _kill_group(process.pid)
    said = folder.read_outcome()
    killed = _killed_by(code)
    if said is not None:
        outcome, message = said
        # Ranks that are left behind can only tell that they lost another one.
        return Ending(outcome, f"a rank was {killed}; {message}" if killed and outcome is Outcome.FAILED else message)
    if stop.impatient:
        return Ending(Outcome.STOPPED, "ended at once; the run can go on from its last complete checkpoint")
    return Ending(Outcome.FAILED, _last_words(folder, killed or f"exit code {code}", began))


@dataclass
class _Stop:
    """What the user's signals have asked for."""

    end_at_once: Callable[[], None]
    asked: float | None = None  # time.monotonic() of the first signal
    impatient: bool = False


@contextmanager
def _signals_as_stop(folder: RunFolder) -> Iterator[_Stop]:
    """While inside, the first signal makes RUN/STOP, and Ctrl-C after it ends the ranks. Takes its STOP away again."""
    stop = _Stop(end_at_once=lambda: None)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.asked is None:
            stop.asked = time.monotonic()
            folder.stop.touch()
            _tell("stopping: the ranks save a checkpoint and end; Ctrl-C again ends them at once")
        elif number == signal.SIGINT and time.monotonic() - stop.asked > _IMPATIENCE_SECONDS:
            stop.impatient = True
            stop.end_at_once()

    # Under nohup the hang-up of the terminal is ignored, and shall be.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS if number not in ignored}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.asked is not None:
            folder.stop.unlink(missing_ok=True)


@contextmanager
def _watchdog(group: int) -> Iterator[None]:
    """While inside, another process waits to kill the group as soon as this one is gone, however it went.

    It notices by the pipe between them, which closes then.
    """
    shell = 'read -r _; kill -s KILL -- "-$0"'
    watchdog = subprocess.Popen(["sh", "-c", shell, str(group)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watchdog.kill()
        watchdog.communicate()


@contextmanager
def _sole_launch(folder: RunFolder) -> Iterator[None]:
    lock = filelock.FileLock(folder.logs / "launch.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"run.dir: another deepcloze is at work in {folder.path}") from None
    try:
        yield
    finally:
        lock.release()


def _await_group(group: int) -> None:
    """Wait until no process of the group is left, for a while: DeepSpeed's processes may end before the ranks do."""
    deadline = time.monotonic() + _GRACE_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _killed_by(code: int) -> str | None:
    """'killed by …' for the exit code of a process that a signal ended.

    DeepSpeed's launcher passes on a rank's death by signal N as 256 - N.
    """
    number = -code if code < 0 else 256 - code
    if not 0 < number < signal.NSIG:
        return None
    why = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{why}"


def _last_words(folder: RunFolder, how: str, began: float) -> str:
    """What to say of ranks that ended without writing their outcome: where to look, and the log of the failed one."""
    message = f"the ranks ended without a word ({how}); their logs are in {folder.logs}"
    tails = {path: _tail(path) for path in sorted(folder.logs.glob("rank-*.log")) if path.stat().st_mtime >= began}
    if not tails:
        return message
    # The rank that failed falls silent first; the others notice later that it is gone.
    failed = [path for path, tail in tails.items() if "Traceback" in tail]
    path = min(failed, key=_changed) if failed else max(tails, key=_changed)
    return f"{message}\nthe end of {path.name}:\n{tails[path]}"


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])


def _read_attempts(folder: RunFolder) -> list[dict[str, object]]:
    if not folder.launches.exists():
        return []
    return [json.loads(line) for line in folder.launches.read_text(encoding="utf-8").splitlines()]


def _write_attempts(folder: RunFolder, attempts: Sequence[Mapping[str, object]]) -> None:
    write_text(folder.launches, "".join(json.dumps(attempt, ensure_ascii=False) + "\n" for attempt in attempts))


def _tell(message: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"deepcloze: {message}", file=sys.stderr, flush=True)
