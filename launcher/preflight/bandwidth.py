"""Start the timed all-reduce over all ranks of a launch, in processes of its own, as a run would start."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from experiment.files import write_text
from experiment.run_lock import temporary_folder
from launcher.hosts.guarded_hosts import GuardedHosts, GuardRequest, Rendezvous
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Machine
from launcher.preflight.target import Target
from launcher.ranks.deepspeed_command import Command, DeepSpeedCommand, added_environment, start_command
from launcher.ranks.placement import is_local
from launcher.supervision.rank_processes import kill_group, watchdog

LIMIT_SECONDS = 240.0
"""After which each rank gives up. Most of it is for the start: Python's modules may come from a slow disk."""

RESULT_MARK = "deepcloze-preflight:"
_EXIT_SECONDS = 30.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class Measurement:
    """What the ranks measured."""

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
    """Measure all-reduce bandwidth, links and compute over these slots, some of the target's.

    Raises MeasurementError with the end of the output.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "deepcloze-preflight-", mode=0o700) as temporary:
        if is_local(slots):
            output = _run(_command(slots, machine, target, temporary), groups=[])
        else:
            name = f"{os.urandom(8).hex()}-0"
            request = GuardRequest(name, target.host_environment, head=next(iter(slots)))
            groups: list[int] = []
            with GuardedHosts(list(slots), request, lambda guards: _kill_if_lost(guards, groups)) as guards:
                _check_lost(guards)
                output = _run(_command(slots, machine, target, temporary, guards.rendezvous()), groups)
                _check_lost(guards)
    for line in output.splitlines():
        _, mark, result = line.partition(RESULT_MARK)
        if mark:
            return TypeAdapter(Measurement).validate_json(result)
    raise MeasurementError(f"the all-reduce over all ranks failed; the end of its output:\n{_tail(output)}")


def _command(
    slots: Slots, machine: Machine, target: Target, temporary: Path, rendezvous: Rendezvous | None = None
) -> Command:
    """How the measurement is started. Without a rendezvous, all ranks run on this machine."""
    command = DeepSpeedCommand(
        python=sys.executable,
        module="launcher.preflight.start_measurement",
        config=None,
        slots=slots,
        master_port=rendezvous.port if rendezvous else target.port,
        hostfile=temporary / "hostfile" if rendezvous else None,
        launcher=target.launcher,
        master_addr=rendezvous.address if rendezvous else None,
    )
    added = added_environment(machine, local=rendezvous is None)
    return start_command(command, machine, added, target.host_environment, rendezvous)


def _kill_if_lost(guards: GuardedHosts, groups: Sequence[int]) -> None:
    if guards.lost:
        for group in groups:
            kill_group(group)


def _check_lost(guards: GuardedHosts) -> None:
    if lost := dict(guards.lost):
        raise MeasurementError("lost " + "; ".join(f"{host}: {reason}" for host, reason in lost.items()))


def _run(command: Command, groups: list[int]) -> str:
    """The output of the command. Kills it, and all that it has started here, if it does not end in time.

    `groups`: gets its process group.
    """
    for path, text in command.files.items():
        write_text(path, text)
    process = subprocess.Popen(
        command.argv,
        env=dict(command.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    groups.append(process.pid)
    try:
        with watchdog(process.pid):
            return process.communicate(timeout=LIMIT_SECONDS + _EXIT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        output = process.communicate()[0]
        raise MeasurementError(
            f"the all-reduce over all ranks did not end within {LIMIT_SECONDS + _EXIT_SECONDS:.0f} s; the end of its "
            f"output:\n{_tail(output)}"
        ) from None
    finally:
        kill_group(process.pid)


def _tail(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n".join(lines[-_TAIL_LINES:])
