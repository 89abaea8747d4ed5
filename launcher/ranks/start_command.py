"""How DeepSpeed is started: its command line, environment and the files that it reads. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiment.provenance import REPOSITORY
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.hostfile import hostfile_text
from launcher.hosts.machine import Machine
from launcher.ranks.deepspeed_command import DeepSpeedCommand, deepspeed_argv
from launcher.ranks.environment import (
    deepspeed_environment,
    exported_text,
    exported_variables,
    launch_environment,
    remote_deepspeed_environment,
)


@dataclass(frozen=True)
class Command:
    """How DeepSpeed is started."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    files: Mapping[Path, str] = field(default_factory=dict)  # path -> text: written before the start


def added_environment(machine: Machine, local: bool) -> dict[str, str]:
    """The variables that a launch from this machine adds for all ranks. local: whether all of them run on it."""
    return launch_environment(machine.environ, machine.devices.kind if local else None, REPOSITORY)


def start_command(
    command: DeepSpeedCommand,
    machine: Machine,
    added: Mapping[str, str],
    forwarded: Mapping[str, str],
    rendezvous: Rendezvous | None,
) -> Command:
    """The command with its environment and, for ranks on other hosts, its hostfile and the variables to export, which
    are written to the folder of the hostfile.

    Args:
        machine: the machine that it is started on.
        added: variables that the launch adds for its ranks.
        forwarded: variables that guards bring to other hosts.
        rendezvous: None: unknown, or all ranks run on this machine.
    """
    argv = tuple(deepspeed_argv(command))
    if command.hostfile is None:
        return Command(argv, deepspeed_environment(machine.environ, added))
    exports = command.hostfile.with_name("worker.env")
    exported = exported_variables(added, rendezvous, command.launcher)
    environment = remote_deepspeed_environment(machine.environ, added, forwarded) | {"DS_ENV_FILE": str(exports)}
    files = {
        command.hostfile: hostfile_text(command.slots),
        exports: exported_text(exported, machine.deepspeed_env_text()),
    }
    return Command(argv, environment, files)
