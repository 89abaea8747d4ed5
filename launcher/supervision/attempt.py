"""One attempt to run a launch: start DeepSpeed and wait until all its processes have exited, on all hosts.

DeepSpeed's launcher kills the ranks when it gets a signal, and its exit code says little. Therefore it runs in a
session of its own, which Ctrl-C does not reach. The outcome is read from the run folder, where the ranks write it
(`launch_result`). Processes on other hosts are guarded (`guarded_hosts`).
"""

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from experiment.process.signals import kill_group
from experiment.run_files.heartbeat import beat_seconds
from experiment.run_files.outcome_file import Cause, Outcome, host_of, read_outcome
from experiment.run_files.run_folder import RunFolder
from experiment.run_files.run_lock import Renewal
from experiment.tracking.config import TrackingConfig
from launcher.hosts.guarded_hosts import GuardedHosts, Rendezvous, name_reasons
from launcher.hosts.hostfile import Slots
from launcher.ranks.deepspeed_command import DeepSpeedCommand
from launcher.ranks.environment import Launcher
from launcher.supervision.hang_watch import HangWatch
from launcher.supervision.launch_result import (
    STOPPED_EARLY,
    AttemptRecord,
    LaunchResult,
    all_done,
    has_begun,
    log_sizes,
    read_result,
)
from launcher.supervision.rank_processes import (
    EXIT_TIMEOUT_SECONDS,
    ExitWatch,
    HeldRanks,
    RankProcesses,
    RunningRanks,
    polled,
    started,
)
from launcher.supervision.stop_signals import StopSignals, kill_on_early_stop

_POLL_SECONDS = 0.2
_EXIT_POLL_SECONDS = 1.0
_REMOTE_EXIT_POLL_SECONDS = 5.0  # reads the records of all ranks from a network disk
_KILLED = LaunchResult(
    Outcome.STOPPED, "killed; the same command resumes from the last complete checkpoint, or starts over without one"
)


@dataclass(frozen=True)
class Layout:
    """The placement of the ranks, and their share of the configured microbatch."""

    slots: Slots
    microbatch_halvings: int = 0
    restarted: bool = False  # not the first attempt of its launch

    @property
    def ranks(self) -> int:
        return sum(map(len, self.slots.values()))


@dataclass(frozen=True)
class LaunchSettings:
    """Settings for starting ranks, as often as needed."""

    folder: RunFolder
    slots: Slots  # of all hosts
    command: Callable[[Layout, Rendezvous | None], DeepSpeedCommand]  # no rendezvous: all ranks run on this machine
    local: bool = True  # whether they do
    launcher: Launcher = "pdsh"  # of ranks on other hosts
    host_environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # for ranks on other hosts
    max_restarts: int = 0
    max_halvings: int = 0  # of the microbatch
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # for alerts
    hang_seconds: float = 600.0  # as `health.hang_seconds`
    quiet: bool = False  # do not print the output of the ranks
    # see `launcher.preflight.run`
    preflight_problems: Callable[[Collection[str], Collection[str], dict[str, str]], dict[str, str]] = lambda *_: {}
    start_time: float = field(default_factory=time.time)  # of the first attempt
    checked_at: float = field(default_factory=time.time)  # when deepcloze began to check the launch
    dead_owner: Renewal | None = None  # of the run folder, as `check_unlocked` found it
    held: HeldRanks | None = None  # the ranks of the first attempt, if they have been started already


def run_attempt(launch: LaunchSettings, layout: Layout, stop: StopSignals, record: AttemptRecord) -> LaunchResult:
    """Run the ranks of this layout until they have exited. No process of theirs remains on a host that answers."""
    if stop.killed:
        return _KILLED
    if not launch.local:
        return _run_on_hosts(launch, layout, stop, record)
    processes, held = RankProcesses(), launch.held
    command = held.command if held else launch.command(layout, None)
    record.start(command.argv)
    ranks = held.begin() if held else started(command, record.start_time, subprocess.DEVNULL if launch.quiet else None)
    return _run(launch, layout, ranks, stop, processes, None)


def _run_on_hosts(launch: LaunchSettings, layout: Layout, stop: StopSignals, record: AttemptRecord) -> LaunchResult:
    processes = RankProcesses()
    name = f"{xxhash.xxh3_64_hexdigest(os.fsencode(launch.folder.path))}-{os.urandom(8).hex()}"  # of this attempt
    guards = GuardedHosts(list(layout.slots), name, launch.host_environment, processes.kill)
    result = None
    with stop.killing(guards.cancel), kill_on_early_stop(launch.folder, stop) as stopped_early, guards:
        if not guards.lost and not stop.killed:
            command = launch.command(layout, guards.rendezvous())
            record.start(command.argv)
            ranks = started(command, record.start_time, subprocess.DEVNULL if launch.quiet else subprocess.PIPE)
            result = _run(launch, layout, ranks, stop, processes, guards)
        lost = dict(guards.lost)
    if stopped_early.is_set():
        return STOPPED_EARLY
    if result is None and stop.killed:
        return _KILLED
    if result is None or (lost and _is_explained_by_a_lost_host(result)):
        return LaunchResult(Outcome.FAILED, f"lost {name_reasons(lost)}", Cause.LOST_HOST, frozenset(lost))
    return result


def _is_explained_by_a_lost_host(result: LaunchResult) -> bool:
    return result.outcome is Outcome.FAILED and result.cause not in (Cause.AGREED, Cause.OUT_OF_MEMORY)


def _run(
    launch: LaunchSettings,
    layout: Layout,
    ranks: RunningRanks,
    stop: StopSignals,
    processes: RankProcesses,
    guards: GuardedHosts | None,
) -> LaunchResult:
    """Let the ranks begin, and wait until they have exited."""
    earlier = log_sizes(launch.folder)
    request_stack = (guards or processes).request_stack
    hang = HangWatch(launch.folder, layout.ranks, launch.hang_seconds, request_stack, processes.kill)
    exits = ExitWatch(launch.folder, processes, guards)
    exit_poll_seconds = _REMOTE_EXIT_POLL_SECONDS if guards else _EXIT_POLL_SECONDS
    with (
        ranks as process,
        processes.running(process.pid),
        stop.killing(processes.kill),
        polled(hang.is_settled, beat_seconds(launch.hang_seconds), "hang watch"),
        polled(exits.check, exit_poll_seconds, "exit watch"),
    ):
        exit_code = _wait(process, launch, layout.ranks)
    nodes = Counter[str]()  # ranks, by the names that their hosts have themselves
    for host, numbers in layout.slots.items():
        nodes[guards.replies[host].node if guards else platform.node()] += len(numbers)
    result = _result(launch, stop, hang, exits, exit_code, earlier, nodes)
    return replace(result, failed_on=_failed_on(result, hang, exits, guards)) if guards else result


def _failed_on(result: LaunchResult, hang: HangWatch, exits: ExitWatch, guards: GuardedHosts) -> frozenset[str]:
    """Return the host of a failure, if it is known. Of a collective that fails it is not: a rank reports the error of
    another."""
    nodes = set[str | None]()
    if result.cause is Cause.HUNG:
        nodes |= hang.hosts
    elif result.cause is Cause.KILLED:
        nodes |= {record.host for record in exits.silent()}
    elif result.cause in (Cause.ERROR, Cause.LOST_HOST):
        nodes.add(host_of(result.message))
    hosts = {host for node in nodes for host in guards.named(node)}
    if result.cause is Cause.KILLED and not nodes and exits.ended_host is not None:
        hosts = {exits.ended_host}
    return frozenset(hosts) if len(hosts) == 1 else frozenset()


def _result(
    launch: LaunchSettings,
    stop: StopSignals,
    hang: HangWatch,
    exits: ExitWatch,
    exit_code: int,
    earlier: Mapping[Path, int],
    ranks: Counter[str],
) -> LaunchResult:
    """Return the result of processes that have exited. exit_code, earlier, ranks: see `read_result`."""
    reported = read_outcome(launch.folder)
    if stop.killed and (reported is None or reported.outcome is Outcome.STOPPED):
        return _KILLED
    if hang.message is not None and (reported is None or reported.outcome is Outcome.FAILED):
        return LaunchResult(Outcome.FAILED, hang.message, Cause.HUNG)
    silent = [] if stop.killed else exits.silent()
    others_killed = exits.killed and not launch.local
    if others_killed:
        if reported is None and not silent and exits.ended_host is not None:
            message = f"the processes on {exits.ended_host} ended, and the ones on other hosts did not"
            return LaunchResult(Outcome.FAILED, message, Cause.KILLED)
        exit_code = 1  # the exit code of DeepSpeed's launcher says only that `exits` killed it
    if reported is None and stop.requested and not has_begun(launch.folder):
        return STOPPED_EARLY  # DeepSpeed's launchers on other hosts exit with 1 if they get the signal too
    if not launch.local and launch.launcher == "mpich":  # DeepSpeed's helper exits with 0, whatever its rank does
        exit_code = exit_code or 1
    return read_result(launch.folder, exit_code, earlier, silent, not launch.local, ranks, others_killed)


def _wait(process: "subprocess.Popen[bytes]", launch: LaunchSettings, ranks: int) -> int:
    """Return the exit code of DeepSpeed's launcher, once its process group is empty. On this machine, the rest of the
    group is killed when all ranks are done: DeepSpeed takes up to a second to notice that and to exit."""
    exit_code = None
    while exit_code is None:
        with suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(_POLL_SECONDS if launch.local else None)
        if exit_code is None and all_done(launch.folder, ranks):
            kill_group(process.pid)
            process.wait()
            return 0
    if exit_code < 0:  # DeepSpeed's launcher was killed: its ranks train on
        kill_group(process.pid)
    _wait_for_group(process.pid)
    return exit_code


def _wait_for_group(group: int) -> None:
    """Wait until the process group is empty, or time out: DeepSpeed's launcher may exit before the ranks do."""
    deadline = time.monotonic() + EXIT_TIMEOUT_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
