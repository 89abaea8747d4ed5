"""Command line, environment and input files of DeepSpeed."""

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiment.files import REPOSITORY
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Machine
from launcher.ranks.environment import (
    Launcher,
    deepspeed_environment,
    exported_text,
    launch_environment,
    remote_deepspeed_environment,
)

# Run as a module, so that the ranks use this interpreter whatever PATH says.
_PYTHON = (sys.executable, "-m")
# DeepSpeed would log a stopped rank as an error; the ranks and `deepcloze` report how it ended.
_LOG_LEVEL = "--log_level=critical"
_MODULE = "launcher.ranks.start_rank"
_FILE = str(REPOSITORY / "launcher" / "ranks" / "start_rank.py")


@dataclass(frozen=True)
class DeepSpeedCommand:
    """A command that starts DeepSpeed: one rank per slot, each running `launcher.ranks.start_rank ARGUMENT…`."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    files: Mapping[Path, str] = field(default_factory=dict)  # path -> text: written before the start


def command_on_this_machine(slots: Slots, arguments: Sequence[str], machine: Machine) -> DeepSpeedCommand:
    """Return the command for ranks that all run on this machine."""
    # `deepspeed` starts this on each host. Started directly, one process less has to import torch, which takes seconds.
    argv = (
        *_PYTHON,
        *("deepspeed.launcher.launch", _LOG_LEVEL),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(dict(slots)).encode()).decode()}",
        *("--master_addr=127.0.0.1", f"--master_port={machine.find_port()}"),
        *("--module", _MODULE, *arguments),
    )
    added = launch_environment(machine.environ, machine.devices.kind)
    return DeepSpeedCommand(argv, deepspeed_environment(machine.environ, added))


def command_on_hosts(
    slots: Slots,
    arguments: Sequence[str],
    machine: Machine,
    folder: Path,
    launcher: Launcher,
    forwarded: Mapping[str, str],
    rendezvous: Rendezvous | None,
) -> DeepSpeedCommand:
    """Return the command for ranks on other hosts, with its hostfile and the variables to export. folder: for its
    files; absolute. forwarded: variables that guards bring to the hosts. rendezvous: None: unknown."""
    hostfile, exports = folder / "hostfile", folder / "worker.env"
    address, port = (rendezvous.address, rendezvous.port) if rendezvous else (None, machine.find_port())
    include = "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())
    argv = (
        *_PYTHON,
        # The guards have answered. DeepSpeed would connect to the first host again, without a timeout.
        *("deepspeed.launcher.runner", _LOG_LEVEL, "--no_ssh_check", f"--master_port={port}"),
        *([f"--master_addr={address}"] if address else []),  # else DeepSpeed asks the first host
        f"--hostfile={hostfile}",
        # MPI launchers reject --include: their hostfile has just these slots.
        *([f"--include={include}"] if launcher in ("pdsh", "slurm") else []),
        *([f"--launcher={launcher}"] if launcher != "pdsh" else []),
        # Without --force_multi, DeepSpeed would run the ranks of a single remote host on this machine.
        *(["--force_multi"] if len(slots) == 1 else []),
        # DeepSpeed ignores --module with slurm, and with mpich applies it to a script of its own, which does not start.
        *([_FILE] if launcher in ("slurm", "mpich") else ["--module", _MODULE]),
        *arguments,
    )
    added = launch_environment(machine.environ, device=None)
    environment = remote_deepspeed_environment(machine.environ, added, forwarded) | {"DS_ENV_FILE": str(exports)}
    hosts = "".join(f"{host} slots={max(numbers) + 1}\n" for host, numbers in slots.items())  # up to the last one used
    exported = exported_text(added, rendezvous, launcher, machine.deepspeed_env_text)
    files = {hostfile: hosts, exports: exported}
    return DeepSpeedCommand(argv, environment, files)
