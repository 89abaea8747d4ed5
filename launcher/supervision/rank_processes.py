"""The processes of ranks: DeepSpeed's launcher and all that it starts, in a process group of their own."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiment.launch_variable import GATE_VARIABLE, START_VARIABLE
from experiment.signals import warnings_blocked
from launcher.ranks.start_command import Command
from launcher.supervision.output_filter import filtered_output
from launcher.supervision.process_groups import kill_group, watchdog


@dataclass(frozen=True)
class RankProcesses:
    """Ranks to be started, or that wait at a gate."""

    command: Command
    begin: Callable[[], AbstractContextManager["subprocess.Popen[bytes]"]]
    """Lets them begin, once. DeepSpeed's launcher, whose process group is killed at the end of the block."""


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


@contextmanager
def held_ranks(command: Command, start_time: float) -> Iterator[RankProcesses]:
    """Start ranks on this machine that import their modules, which takes seconds, and wait until they may begin.

    They are killed at the end of the block unless `begin` was called. `start_time`: of the attempt, as `time.time()`.
    """
    with tempfile.TemporaryDirectory(prefix="deepcloze-launch-") as folder, ExitStack() as held:
        gate = Path(folder) / "gate"
        process = held.enter_context(started(command, start_time, gate=gate))

        @contextmanager
        def begin() -> Iterator["subprocess.Popen[bytes]"]:
            with held.pop_all():
                gate.touch()
                yield process

        yield RankProcesses(command, begin)
