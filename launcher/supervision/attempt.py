"""One attempt to run a launch: start DeepSpeed and wait until all its processes have exited, on all hosts.

DeepSpeed's launcher kills the ranks when it gets a signal, and its exit code says little. Therefore it runs in a
session of its own, which Ctrl-C does not reach. The outcome is read from the run folder, where the ranks write it
(`launch_result`). Processes on other hosts are guarded (`guarded_hosts`).
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from experiment.files import atomic_write
from experiment.heartbeat import Heartbeat, request_stack
from experiment.outcome_file import Cause, Outcome, read_outcome
from experiment.run_folder import RunFolder
from experiment.tracking.config import TrackingConfig
from launcher.hosts.guarded_hosts import GuardedHosts, GuardRequest, Rendezvous
from launcher.hosts.hostfile import Slots
from launcher.ranks.deepspeed_command import Command
from launcher.supervision.hang_watch import WatchedRanks, hang_watch
from launcher.supervision.launch_result import AttemptRecord, LaunchResult, all_done, has_begun, read_result
from launcher.supervision.rank_processes import HeldRanks, RunningRanks, kill_group, started
from launcher.supervision.stop_signals import StopSignals, kill_on_early_stop

# DeepSpeed's launcher gives ranks 30 s to exit after one of them failed or it got a signal.
_EXIT_TIMEOUT_SECONDS = 40.0
_POLL_SECONDS = 0.2
_KILLED = LaunchResult(Outcome.STOPPED, "killed; the run can resume from its last complete checkpoint")
_STOPPED_EARLY = LaunchResult(
    Outcome.STOPPED, "stopped before the first step; run the same command again", Cause.SIGNAL
)


@dataclass(frozen=True)
class Layout:
    """Where ranks run, and with what share of the configured microbatch."""

    slots: Slots
    microbatch_halvings: int = 0


@dataclass(frozen=True)
class Launch:
    """What is started, as often as needed."""

    folder: RunFolder
    slots: Slots  # of all hosts
    command: Callable[[Layout, Rendezvous | None], Command]  # no rendezvous: all ranks run on this machine
    local: bool = True  # whether they do
    host_environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # for ranks on other hosts
    max_restarts: int = 0
    max_halvings: int = 0  # of the microbatch
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # for alerts
    hang_seconds: float = 600.0  # as `health.hang_seconds`
    quiet: bool = False  # do not print what the ranks print
    passing_hosts: Callable[[Collection[str]], Collection[str]] = lambda hosts: hosts  # those that pass preflight


def run_attempt(
    launch: Launch, layout: Layout, stop: StopSignals, record: AttemptRecord, held: HeldRanks | None = None
) -> LaunchResult:
    """Run the ranks of this layout until they have exited. No process of theirs remains on a host that answers.

    held: the ranks, if they have been started already.
    """
    if stop.killed:
        return _KILLED
    if launch.local:
        return _run_here(launch, layout, stop, record, held)
    return _run_on_hosts(launch, layout, stop, record)


def _run_here(
    launch: Launch, layout: Layout, stop: StopSignals, record: AttemptRecord, held: HeldRanks | None
) -> LaunchResult:
    """Run the ranks on this machine."""
    processes = _Processes()
    command = held.command if held else launch.command(layout, None)
    output = subprocess.DEVNULL if launch.quiet else None
    ranks = held.begin() if held else started(command, record.start_time, output)
    _prepare(command, record)
    return _run(launch, ranks, stop, processes, _watched_ranks(launch, layout, processes, processes.request_stack))


def _run_on_hosts(launch: Launch, layout: Layout, stop: StopSignals, record: AttemptRecord) -> LaunchResult:
    """Run the ranks on hosts that are guarded."""
    processes, hosts = _Processes(), list(layout.slots)
    request = GuardRequest(_launch_name(launch.folder), launch.host_environment, head=hosts[0])
    guards = GuardedHosts(hosts, request, processes.check)
    result = None
    with stop.killing(guards.cancel), kill_on_early_stop(launch.folder, stop) as stopped_early, guards:
        if not guards.lost and not stop.killed:
            command = launch.command(layout, guards.rendezvous())
            ranks = started(command, record.start_time, subprocess.DEVNULL if launch.quiet else subprocess.PIPE)
            _prepare(command, record)
            result = _run(
                launch, ranks, stop, processes, _watched_ranks(launch, layout, processes, guards.request_stack)
            )
        lost = dict(guards.lost)
    if stopped_early.is_set():
        return _STOPPED_EARLY
    if result is None and stop.killed:
        return _KILLED
    if result is None or (lost and _is_explained_by_a_lost_host(result)):
        reasons = "; ".join(f"{host}: {reason}" for host, reason in lost.items())
        return LaunchResult(Outcome.FAILED, f"lost {reasons}", Cause.LOST_HOST, frozenset(lost))
    return result


def _is_explained_by_a_lost_host(result: LaunchResult) -> bool:
    return result.outcome is Outcome.FAILED and result.cause not in (Cause.AGREED, Cause.OUT_OF_MEMORY)


class _Processes:
    """The processes of an attempt. They end when a host is lost, or some time after those of a host have ended.

    `left`: the host whose processes had ended when the others were killed.
    """

    def __init__(self) -> None:
        self.left: str | None = None
        self._group: int | None = None
        self._killed = False
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def started(self, group: int) -> None:
        with self._lock:
            self._group = group
            if self._killed:
                self.kill()

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._group is not None:
                kill_group(self._group)

    def request_stack(self, beat: Heartbeat) -> None:
        """Unless the rank has ended: its process id may be that of another process by now."""
        with self._lock, suppress(ProcessLookupError):
            if os.getpgid(beat.pid) == self._group:
                request_stack(beat.pid)

    def check(self, guards: GuardedHosts) -> None:
        with self._lock:
            if guards.lost:
                self.kill()
            elif self._timer is None and (
                left := [host for host, count in dict(guards.processes).items() if not count]
            ):
                self._timer = threading.Timer(_EXIT_TIMEOUT_SECONDS, self._kill_others, left[:1])
                self._timer.daemon = True
                self._timer.start()

    def ended(self) -> None:
        with self._lock:
            self._group = None
            if self._timer is not None:
                self._timer.cancel()

    def _kill_others(self, left: str) -> None:
        with self._lock:
            if self._group is not None:
                self.left = left
                self.kill()


def _launch_name(folder: RunFolder) -> str:
    """A new name for an attempt, as `LAUNCH_VARIABLE` has it."""
    return f"{xxhash.xxh3_64_hexdigest(os.fsencode(folder.path))}-{os.urandom(8).hex()}"


def _watched_ranks(
    launch: Launch, layout: Layout, processes: _Processes, request_stack: Callable[[Heartbeat], None]
) -> WatchedRanks:
    ranks = sum(map(len, layout.slots.values()))
    return WatchedRanks(launch.folder, ranks, launch.hang_seconds, request_stack, processes.kill)


def _prepare(command: Command, record: AttemptRecord) -> None:
    """Record the command and write the files that it reads."""
    record.start(command.argv)
    for path, text in command.files.items():
        _write_private(path, text)


def _run(
    launch: Launch, ranks: RunningRanks, stop: StopSignals, processes: _Processes, watched: WatchedRanks
) -> LaunchResult:
    """Let the ranks begin, and wait until they have exited."""
    start_time = time.time()
    try:
        with ranks as process, hang_watch(watched) as hang:
            processes.started(process.pid)
            with stop.killing(processes.kill):
                exit_code = _wait(process, launch)
    finally:
        processes.ended()
    return _result(launch, stop, hang.message, processes.left, exit_code, start_time)


def _result(
    launch: Launch, stop: StopSignals, hung: str | None, left: str | None, exit_code: int, start_time: float
) -> LaunchResult:
    """The result of processes that have exited.

    Args:
        hung: the message if they were killed because a rank hung.
        left: the host that they were killed for: its own had ended.
        exit_code: of DeepSpeed's launcher.
        start_time: when the ranks began, as `time.time()`.
    """
    reported = read_outcome(launch.folder)
    if stop.killed and (reported is None or reported.outcome is Outcome.STOPPED):
        return _KILLED
    if hung is not None and (reported is None or reported.outcome is Outcome.FAILED):
        return LaunchResult(Outcome.FAILED, hung, Cause.HUNG)
    if left is not None:
        if reported is None:
            message = f"the processes on {left} ended, and those on other hosts did not"
            return LaunchResult(Outcome.FAILED, message, Cause.KILLED)
        exit_code = 1  # that of DeepSpeed's launcher says only that `processes` killed it
    if reported is None and stop.requested and not has_begun(launch.folder):
        return _STOPPED_EARLY  # DeepSpeed's launcher exits with 1 if it gets the signal too
    return read_result(launch.folder, exit_code, start_time, remote=not launch.local)


def _wait(process: "subprocess.Popen[bytes]", launch: Launch) -> int:
    """The exit code of DeepSpeed's launcher, once its process group is empty. On this machine, what is left of the
    group when all ranks are done is killed: DeepSpeed takes up to a second to notice that and to exit."""
    ranks = sum(map(len, launch.slots.values()))
    exit_code = None
    while exit_code is None:
        with suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(_POLL_SECONDS if launch.local else None)
        if exit_code is None and all_done(launch.folder, ranks):
            kill_group(process.pid)
            process.wait()
            return 0
    _wait_for_group(process.pid)
    return exit_code


def _write_private(path: Path, text: str) -> None:
    """Write a file that only the user can read."""
    with atomic_write(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="utf-8")


def _wait_for_group(group: int) -> None:
    """Wait until the process group is empty, or time out: DeepSpeed's launcher may exit before the ranks do."""
    deadline = time.monotonic() + _EXIT_TIMEOUT_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
