"""The processes of ranks: DeepSpeed's launcher and all that it starts, in a process group of their own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from experiment.errors import UserError
from experiment.goodput import process_start
from experiment.own_process import GATE_VARIABLE, START_VARIABLE
from experiment.run_lock import temporary_folder
from experiment.signals import handle_stop_signals, interrupt, warnings_blocked
from launcher.ranks.deepspeed_command import Command

_NOISE = re.compile(
    rb"(\S+: )?("  # pdsh puts the host first
    rb"\[[-0-9]+ [:,0-9]+\] \[(INFO|WARNING)\] \[(launch|real_accelerator)\.py:"
    rb"|\[W.*\[c10d\] The hostname of the client socket cannot be retrieved)"
)
RunningRanks = AbstractContextManager["subprocess.Popen[bytes]"]
"""Lets ranks begin. In the block there is DeepSpeed's launcher, whose process group is killed at the end."""


@contextmanager
def watchdog(group: int) -> Iterator[None]:
    """Kill the process group if this process dies, even by SIGKILL.

    A second process waits on a pipe, which closes when this process exits.
    """
    shell = 'read -r _; kill -s KILL -- "-$0"'
    with warnings_blocked():
        watchdog = subprocess.Popen(["sh", "-c", shell, str(group)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watchdog.kill()
        watchdog.communicate()


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def is_noise(line: bytes) -> bool:
    return _NOISE.match(line) is not None


@contextmanager
def filtered_output(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Print what a process writes to its pipes, line by line, until it has ended."""
    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [
        threading.Thread(target=_copy, args=(source, target.buffer), daemon=True) for source, target in pairs if source
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    with source:
        for line in source:
            if not is_noise(line):
                with suppress(OSError):  # the terminal may be closed
                    target.write(line)
                    target.flush()


@dataclass(frozen=True)
class HeldRanks:
    """Ranks on this machine that have been started, and wait after their imports."""

    command: Command
    start_time: float  # of the attempt, exactly as the ranks know it
    begin: Callable[[], RunningRanks]  # to call once


@contextmanager
def started(
    command: Command, start_time: float, output: int | None = None, gate: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start DeepSpeed's launcher. Its process group is killed at the end of the block, or when this process dies.

    Args:
        start_time: of the attempt, as `time.time()`.
        output: as `stdout` of `subprocess.Popen`, also for errors.
        gate: a file; the ranks wait for it before they begin.
    """
    environment = {**command.environment, START_VARIABLE: str(start_time)}
    if gate is not None:
        environment[GATE_VARIABLE] = str(gate)
    with warnings_blocked():
        process = subprocess.Popen(
            command.argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with filtered_output(process):
        try:
            with watchdog(process.pid):
                yield process
        finally:
            kill_group(process.pid)
            process.wait()


@contextmanager
def held_ranks(command: Command) -> Iterator[HeldRanks]:
    """Start ranks that import their modules, which takes seconds, and wait until `begin` is called. They are killed at
    the end of the block, or earlier if this process dies. Raises KeyboardInterrupt for a stop signal.

    `begin` raises UserError if its temporary folder was removed or is full.
    """
    start_time = process_start()
    with (
        temporary_folder(Path(tempfile.gettempdir()), "deepcloze-launch-", mode=0o700) as folder,
        ExitStack() as held,
    ):
        gate = folder / "gate"
        signals: list[int] = []
        with handle_stop_signals(signals.append):  # an exception while they start would leave them running
            process = held.enter_context(started(command, start_time, gate=gate))
        if signals:
            interrupt(signals[0])

        @contextmanager
        def begin() -> Iterator["subprocess.Popen[bytes]"]:
            if process.poll() is not None:  # the ranks that it has left would begin
                kill_group(process.pid)
            with held.pop_all():
                try:
                    gate.touch()
                except OSError as error:
                    raise UserError(f"cannot create {gate}: {error.strerror}") from None
                yield process

        yield HeldRanks(command, start_time, begin)


@contextmanager
def polled(is_settled: Callable[[], bool], seconds: float, name: str) -> Iterator[None]:
    """Call `is_settled` every so many seconds in a thread of this name, until it returns True or the block ends."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(seconds):
            if is_settled():
                return

    thread = threading.Thread(target=poll, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
