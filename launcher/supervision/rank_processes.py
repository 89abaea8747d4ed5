"""The processes of ranks: DeepSpeed's launcher and all that it starts, in a process group of their own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import IO, TextIO

from experiment.errors import UserError
from experiment.files import atomic_write, temporary_folder
from experiment.process.own_process import GATE_VARIABLE, START_VARIABLE
from experiment.process.signals import HANDLED_SIGNALS, handle_stop_signals, interrupt, kill_group, signals_blocked
from experiment.run_files.heartbeat import Heartbeat, request_stack
from experiment.run_files.outcome_file import RankRecord, read_rank_records
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.guarded_hosts import GuardedHosts
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.supervision.launch_result import is_running

_NOISE = re.compile(
    rb"(\S+: )?("  # pdsh puts the host first
    rb"\[[-0-9]+ [:,0-9]+\] \[(INFO|WARNING)\] \[(launch|real_accelerator)\.py:"
    rb"|\[[-0-9]+ [:,0-9]+\] \[ERROR\] \[launch\.py:.* exits with return code = (2|75)$"  # refused or stopped
    rb"|\[W.*\[c10d\] The hostname of the client socket cannot be retrieved"
    rb"|\S+: ssh exited with exit code (2|75)$)"
)
_WATCHDOG_SECONDS = 0.5
EXIT_TIMEOUT_SECONDS = 40.0
"""Limit for the other ranks to exit after one has failed: DeepSpeed's launcher gives each in turn 30 s."""

_FIRST_SECONDS = 15.0  # after a failure, until when DeepSpeed's launcher has killed no other rank

RunningRanks = AbstractContextManager["subprocess.Popen[bytes]"]
"""Context manager that lets ranks begin and yields DeepSpeed's launcher; on exit its process group is killed."""


@contextmanager
def watchdog(group: int) -> Iterator[None]:
    """Kill the process group if this process dies, even by SIGKILL. A second process waits on a pipe, which closes when
    this process exits. If it is killed, another one is started."""
    shell = 'read -r _; kill -s KILL -- "-$0"'

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sh", "-c", shell, str(group)], stdin=subprocess.PIPE, start_new_session=True)

    watchdog = start()

    def replace_if_killed() -> bool:
        nonlocal watchdog
        if watchdog.poll() is not None:
            with suppress(OSError):  # tried again
                watchdog = start()
        return False

    try:
        with polled(replace_if_killed, _WATCHDOG_SECONDS, "watchdog"):
            yield
    finally:
        watchdog.kill()
        watchdog.communicate()


class RankProcesses:
    """The process group of a launch on this machine."""

    def __init__(self) -> None:
        self._group: int | None = None
        self._killed = False
        self._lock = threading.RLock()

    @contextmanager
    def running(self, group: int) -> Iterator[None]:
        """The processes of this group run in the block."""
        with self._lock:
            self._group = group
            if self._killed:
                self.kill()
        try:
            yield
        finally:
            with self._lock:
                self._group = None

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._group is not None:
                kill_group(self._group)

    def request_stack(self, beat: Heartbeat) -> None:
        """Ask a rank for its stack, unless it has ended."""
        with self._lock:
            if self.has(beat.pid):
                request_stack(beat.pid)

    def has(self, pid: int) -> bool:
        """Return whether the process runs. Another group's process may have got the number of one that has ended."""
        with suppress(ProcessLookupError):
            return os.getpgid(pid) == self._group and is_running(pid)
        return False


class ExitWatch:
    """Kills the processes of a launch that are left some time after a rank has failed or stopped, or all of a host have
    ended: ranks in a collective on a GPU wait for them, and do not react to the signal of DeepSpeed's launcher.

    `killed`: whether they were. `ended_host`: the host for which they were.
    """

    def __init__(self, folder: RunFolder, processes: RankProcesses, guards: GuardedHosts | None) -> None:
        """`guards`: None: all ranks run on this machine."""
        self.killed = False
        self.ended_host: str | None = None
        self._folder = folder
        self._processes = processes
        self._guards = guards
        self._failed_at: float | None = None  # as time.monotonic()
        self._records = 0  # of ranks, when one had failed
        self._silent: set[int] = set()  # the first ranks that ended without recording it

    def check(self) -> bool:
        """Call periodically. Returns whether the processes were killed."""
        try:
            records = read_rank_records(self._folder)
        except OSError:  # a network disk does not answer for a moment
            return False
        ended = [record for record in records if self._has_ended(record)]
        ended_host = self._guards.ended_host() if self._guards else None
        if not (ended_host or any(record.exit != 0 for record in ended)):
            # A rank that had just ended may have looked like one that was killed. Records that cannot be read are left
            # out.
            if len(records) >= self._records:
                self._failed_at, self._silent = None, set()
            return False
        self._records = len(records)
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        if self._is_first():
            self._silent |= {record.rank for record in ended if record.exit is None}
        if time.monotonic() - self._failed_at < EXIT_TIMEOUT_SECONDS:
            return False
        self.killed, self.ended_host = True, ended_host
        self._kill(records)
        return True

    def silent(self) -> list[RankRecord]:
        """Return the ranks that ended without recording it before others were killed for them. Call it when all have
        ended."""
        silent = [record for record in read_rank_records(self._folder) if record.exit is None]
        if self.killed or not self._is_first():
            return [record for record in silent if record.rank in self._silent]
        return silent

    def _is_first(self) -> bool:
        """Return whether a rank that ends now was not killed by DeepSpeed's launcher because another has failed."""
        return self._failed_at is None or time.monotonic() - self._failed_at < _FIRST_SECONDS

    def _has_ended(self, record: RankRecord) -> bool:
        if self._guards:  # a host that was cut off may write records of an earlier attempt late
            return self._guards.has_ended(record.host, record.pid)
        return record.exit is not None or not self._processes.has(record.pid)

    def _kill(self, records: Sequence[RankRecord]) -> None:
        """Kill all processes; the guards kill those on other hosts when the launch ends. On this machine alone, kill
        only the ranks: DeepSpeed's launcher then says how the first one has ended."""
        if self._guards:
            self._processes.kill()
            return
        for record in records:
            if self._processes.has(record.pid):
                with suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL)


def is_noise(line: bytes) -> bool:
    return _NOISE.match(line) is not None


@contextmanager
def filtered_output(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Print the output of a process, line by line, until it has ended."""
    pairs = ((process.stdout, sys.stdout, 1), (process.stderr, sys.stderr, 2))
    threads = [
        threading.Thread(target=_copy, args=(source, _binary(stream, descriptor)), daemon=True)
        for source, stream, descriptor in pairs
        if source
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _binary(stream: TextIO, descriptor: int) -> IO[bytes]:
    """Return the stream for bytes. In a notebook, it takes none, but the notebook shows output to its descriptor."""
    return stream.buffer if hasattr(stream, "buffer") else open(descriptor, "wb", closefd=False)


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

    command: DeepSpeedCommand
    begin: Callable[[], RunningRanks]  # to call once


@contextmanager
def started(
    command: DeepSpeedCommand, start_time: float, output: int | IO[bytes] | None = None, gate: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Write the files of a command and start it: DeepSpeed's launcher. Its process group is killed at the end of the
    block, or when this process dies.

    start_time: of the attempt, as `time.time()`. output: as `stdout` of `subprocess.Popen`, also for errors. gate: a
    file; the ranks wait for it before they begin.
    """
    for path, text in command.files.items():
        with atomic_write(path) as temporary:
            temporary.touch(mode=0o600)  # only the user can read it
            temporary.write_text(text, encoding="utf-8")
    environment = {**command.environment, START_VARIABLE: str(start_time)}
    if gate is not None:
        environment[GATE_VARIABLE] = str(gate)
    with signals_blocked(HANDLED_SIGNALS):
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
def held_ranks(command: DeepSpeedCommand, start_time: float) -> Iterator[HeldRanks]:
    """Start ranks that import their modules, which takes seconds, and wait until `begin` is called. They are killed at
    the end of the block, or earlier if this process dies. Raises KeyboardInterrupt for a stop signal.

    start_time: of the attempt, as `time.time()`; the launch has the same.

    `begin` raises UserError if its temporary folder was removed or is full.
    """
    with temporary_folder(Path(gettempdir()), "deepcloze-launch-") as folder, ExitStack() as held:
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

        yield HeldRanks(command, begin)


@contextmanager
def polled(is_settled: Callable[[], bool], seconds: float, name: str) -> Iterator[None]:
    """Call `is_settled` every `seconds` in a thread of this name, until it returns True or the block ends."""
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
