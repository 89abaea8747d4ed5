"""Start the timed all-reduce over all ranks of a launch, in processes of its own, as a run would start."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from experiment.provenance import REPOSITORY
from launcher.deepspeed_command import DeepSpeedCommand, deepspeed_argv
from launcher.environment import deepspeed_environment, launch_environment, remote_environment_text
from launcher.hostfile import Slots, hostfile_text
from launcher.machine import Machine
from launcher.placement import is_local

LIMIT_SECONDS = 240.0
"""After which each rank gives up. Most of it is for the start: Python's modules may come from a slow disk."""

RESULT_MARK = "deepcloze-preflight:"
_EXIT_SECONDS = 30.0
_TAIL_LINES = 15
_EMPTY = re.compile(r"\s*(\S+:\s*)?")  # pdsh puts the host before each line


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


def measure(slots: Slots, machine: Machine, port: int) -> Measurement:
    """Measure all-reduce bandwidth, links and compute over these slots, over a free port of the first host.

    Raises MeasurementError with the end of the output.
    """
    with tempfile.TemporaryDirectory(prefix="deepcloze-preflight-") as temporary:
        argv, environment = _plan(slots, machine, port, Path(temporary))
        output = _run(argv, environment)
    for line in output.splitlines():
        _, mark, result = line.partition(RESULT_MARK)
        if mark:
            return TypeAdapter(Measurement).validate_json(result)
    raise MeasurementError(f"the all-reduce over all ranks failed; the end of its output:\n{_tail(output)}")


def _plan(slots: Slots, machine: Machine, port: int, temporary: Path) -> tuple[list[str], Mapping[str, str]]:
    local = is_local(slots)
    added = launch_environment(machine.environ, machine.devices.kind if local else None, REPOSITORY)
    environment = deepspeed_environment(machine.environ, added)
    hostfile = None
    if not local:
        user_text = "\n".join(path.read_text(encoding="utf-8") for path in machine.deepspeed_env_files)
        (temporary / "worker.env").write_text(remote_environment_text(machine.environ, added, user_text), "utf-8")
        environment["DS_ENV_FILE"] = str(temporary / "worker.env")
        hostfile = temporary / "hostfile"
        hostfile.write_text(hostfile_text(slots), encoding="utf-8")
    command = DeepSpeedCommand(
        python=sys.executable,
        module="launcher.preflight.start_measurement",
        config=None,
        slots=slots,
        device=machine.devices.kind,
        master_port=port,
        hostfile=hostfile,
    )
    return deepspeed_argv(command), environment


def _run(argv: list[str], environment: Mapping[str, str]) -> str:
    """The output of the command. Kills it, and all that it has started here, if it does not end in time."""
    process = subprocess.Popen(
        argv,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        return process.communicate(timeout=LIMIT_SECONDS + _EXIT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        _kill_group(process.pid)
        output = process.communicate()[0]
        raise MeasurementError(
            f"the all-reduce over all ranks did not end within {LIMIT_SECONDS + _EXIT_SECONDS:.0f} s; the end of its "
            f"output:\n{_tail(output)}"
        ) from None
    finally:
        _kill_group(process.pid)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _tail(output: str) -> str:
    """The last lines that say something: the ranks print empty ones too."""
    lines = [line for line in output.splitlines() if not _EMPTY.fullmatch(line)]
    return "\n".join(lines[-_TAIL_LINES:])
