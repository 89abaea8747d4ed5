"""Start the timed all-reduce over all ranks of a launch, in processes of its own, as a run would start."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from experiment.files import parse_record, temporary_folder
from experiment.run_files.run_folder import RunFolder
from launcher.hosts.guarded_hosts import GuardedHosts, name_reasons
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Machine
from launcher.preflight.target import Target
from launcher.ranks.deepspeed_command import DeepSpeedCommand, command_on_hosts, command_on_this_machine
from launcher.ranks.placement import is_local
from launcher.ranks.start_rank import MEASURE
from launcher.supervision.rank_processes import ExitWatch, RankProcesses, polled, started

LIMIT_SECONDS = 240.0
"""Time limit of each rank. Most of it is for the start: Python's modules may come from a slow disk."""

RESULT_MARK = "deepcloze-preflight:"
_EXIT_SECONDS = 30.0
_POLL_SECONDS = 1.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class Measurement:
    """Measurements of the ranks."""

    ranks: int
    bytes: int  # of one all-reduce
    seconds: float  # of one all-reduce, on the slowest rank
    compute_seconds: tuple[float, ...]  # of a fixed computation on the slowest rank of each host
    link_bandwidths: tuple[float, ...]  # bytes/s between each host and the better of its neighbours; empty: one host

    @property
    def bus_bandwidth(self) -> float:
        """Bytes/s, comparable for any number of ranks; defined as in nccl-tests (doc/PERFORMANCE.md there)."""
        return 2 * (self.ranks - 1) / self.ranks * self.bytes / self.seconds


class MeasurementError(Exception):
    """The all-reduce did not start, did not end in time, or failed."""


def measure(slots: Slots, machine: Machine, target: Target) -> Measurement:
    """Measure all-reduce bandwidth, links and compute over these slots, some of the target's. Raises MeasurementError
    with the end of the output."""
    processes = RankProcesses()
    with temporary_folder(Path(gettempdir()), "deepcloze-preflight-") as folder:
        if is_local(slots):
            output = _run(command_on_this_machine(slots, (MEASURE,), machine), folder, processes)
        else:
            launch = f"{os.urandom(8).hex()}-0"
            with GuardedHosts(list(slots), launch, target.host_environment, processes.kill) as guards:
                _check_lost(guards)
                launcher, environment, rendezvous = target.launcher, target.host_environment, guards.rendezvous()
                command = command_on_hosts(slots, (MEASURE,), machine, folder, launcher, environment, rendezvous)
                exits = ExitWatch(RunFolder(folder), processes, guards)
                with polled(exits.check, _POLL_SECONDS, "exit watch"):
                    output = _run(command, folder, processes)
                _check_lost(guards)
                if exits.ended_host is not None:
                    raise MeasurementError(
                        f"the ranks on {exits.ended_host} ended before the others; the end of the output of all:\n"
                        f"{_tail(output)}"
                    )
    for line in output.splitlines():
        _, mark, result = line.partition(RESULT_MARK)
        if mark:
            return parse_record(Measurement, result)
    raise MeasurementError(f"the all-reduce over all ranks failed; the end of its output:\n{_tail(output)}")


def _check_lost(guards: GuardedHosts) -> None:
    if lost := dict(guards.lost):
        raise MeasurementError(f"lost {name_reasons(lost)}")


def _run(command: DeepSpeedCommand, folder: Path, processes: RankProcesses) -> str:
    """Return the output of the command. Kills it, and all that it has started here, if it does not end in time."""
    path, limit = folder / "output", LIMIT_SECONDS + _EXIT_SECONDS
    with path.open("wb") as file, started(command, time.time(), file) as process, processes.running(process.pid):
        try:
            process.wait(limit)
            has_ended = True
        except subprocess.TimeoutExpired:
            has_ended = False
    output = path.read_text(encoding="utf-8", errors="replace")
    if not has_ended:
        raise MeasurementError(
            f"the all-reduce over all ranks did not end within {limit:.0f} s; the end of its output:\n{_tail(output)}"
        )
    return output


def _tail(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n".join(lines[-_TAIL_LINES:])
