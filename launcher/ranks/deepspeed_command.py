"""How DeepSpeed is started: its command line, environment and the files that it reads. Pure."""

import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiment.provenance import REPOSITORY
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.hostfile import Slots, hostfile_text
from launcher.hosts.machine import Machine
from launcher.ranks.environment import (
    deepspeed_environment,
    exported_text,
    exported_variables,
    launch_environment,
    remote_deepspeed_environment,
)
from launcher.ranks.placement import Launcher

# DeepSpeed would log a stopped rank as an error; the ranks and `deepcloze` report how it ended.
_LOG_LEVEL = "--log_level=critical"
_MODULE = "launcher.ranks.start_rank"
_FILE = str(REPOSITORY / "launcher" / "ranks" / "start_rank.py")


@dataclass(frozen=True)
class DeepSpeedCommand:
    """Everything the command line of one launch depends on."""

    slots: Slots
    arguments: tuple[str, ...]  # of each rank
    port: int  # at which the ranks meet, without a rendezvous
    hostfile: Path | None = None  # absolute; None: all slots are on this machine
    launcher: Launcher = "pdsh"  # starts the ranks on other hosts
    rendezvous: Rendezvous | None = None  # None: unknown, or all ranks run on this machine


def deepspeed_argv(command: DeepSpeedCommand) -> list[str]:
    """The argv that starts one rank per slot, each running `launcher.ranks.start_rank ARGUMENT…`."""
    return [
        # Run as a module, so that the ranks use this interpreter whatever PATH says.
        *(sys.executable, "-m", *(_local_launcher(command) if command.hostfile is None else _hosts_launcher(command))),
        *command.arguments,
    ]


def _local_launcher(command: DeepSpeedCommand) -> list[str]:
    # What `deepspeed` starts on each host. Started directly, one process less has to import torch, which takes seconds.
    slots = json.dumps(dict(command.slots))
    return [
        *("deepspeed.launcher.launch", _LOG_LEVEL),
        f"--world_info={base64.urlsafe_b64encode(slots.encode()).decode()}",
        *("--master_addr=127.0.0.1", f"--master_port={command.port}"),
        *("--module", _MODULE),
    ]


def _hosts_launcher(command: DeepSpeedCommand) -> list[str]:
    meeting = command.rendezvous
    address, port = (meeting.address, meeting.port) if meeting else (None, command.port)
    include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in command.slots.items())
    return [
        *("deepspeed.launcher.runner", _LOG_LEVEL, f"--master_port={port}"),
        *([f"--master_addr={address}"] if address else []),  # else DeepSpeed asks the first host
        f"--hostfile={command.hostfile}",
        # MPI launchers reject --include: their hostfile has just these slots.
        *([f"--include={include}"] if command.launcher in ("pdsh", "slurm") else []),
        *([f"--launcher={command.launcher}"] if command.launcher != "pdsh" else []),
        # Without --force_multi, DeepSpeed would run the ranks of a single remote host on this machine.
        *(["--force_multi"] if len(command.slots) == 1 else []),
        # DeepSpeed ignores --module with slurm, and with mpich applies it to a script of its own, which does not start.
        *([_FILE] if command.launcher in ("slurm", "mpich") else ["--module", _MODULE]),
    ]


@dataclass(frozen=True)
class Command:
    """How DeepSpeed is started."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    files: Mapping[Path, str] = field(default_factory=dict)  # path -> text: written before the start


def added_environment(machine: Machine, local: bool) -> dict[str, str]:
    """The variables that a launch from this machine adds for all ranks. local: whether all of them run on it."""
    return launch_environment(machine.environ, machine.devices.kind if local else None, REPOSITORY)


def start_command(command: DeepSpeedCommand, machine: Machine, forwarded: Mapping[str, str]) -> Command:
    """The command with its environment and, for ranks on other hosts, its hostfile and the variables to export, which
    are written to the folder of the hostfile.

    Args:
        machine: the machine that it is started on.
        forwarded: variables that guards bring to other hosts.
    """
    argv = tuple(deepspeed_argv(command))
    added = added_environment(machine, local=command.hostfile is None)
    if command.hostfile is None:
        return Command(argv, deepspeed_environment(machine.environ, added))
    exports = command.hostfile.with_name("worker.env")
    exported = exported_variables(added, command.rendezvous, command.launcher)
    environment = remote_deepspeed_environment(machine.environ, added, forwarded) | {"DS_ENV_FILE": str(exports)}
    files = {
        command.hostfile: hostfile_text(command.slots),
        exports: exported_text(exported, machine.deepspeed_env_text()),
    }
    return Command(argv, environment, files)
