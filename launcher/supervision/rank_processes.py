"""The processes of ranks: DeepSpeed's launcher and all that it starts, in a process group of their own."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import UserError
from experiment.goodput import process_start
from experiment.launch_variable import GATE_VARIABLE, START_VARIABLE
from experiment.signals import warnings_blocked
from launcher.ranks.start_command import Command
from launcher.signal_handlers import handle_stop_signals, interrupt
from launcher.supervision.output_filter import filtered_output
from launcher.supervision.process_groups import kill_group, watchdog
from launcher.temporary_folder import temporary_folder

RunningRanks = AbstractContextManager["subprocess.Popen[bytes]"]
"""Lets ranks begin. In the block there is DeepSpeed's launcher, whose process group is killed at the end."""


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
