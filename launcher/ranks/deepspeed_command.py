"""The `deepspeed` command line of a launch. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiment.provenance import REPOSITORY
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import DeviceKind
from launcher.options import Launcher


@dataclass(frozen=True)
class DeepSpeedCommand:
    """Everything the command line of one launch depends on."""

    python: str  # the interpreter of DeepSpeed's launcher and of the ranks
    module: str  # what each rank runs
    config: Path | None  # absolute; None: the module takes none
    slots: Slots
    device: DeviceKind
    master_port: int
    overrides: Mapping[str, str] = field(default_factory=dict)  # dotted config key -> raw text
    hostfile: Path | None = None  # absolute; None: this machine only
    launcher: Launcher = "pdsh"  # what starts the ranks on other hosts
    master_addr: str | None = None  # of the first host; None: DeepSpeed asks it


def deepspeed_argv(command: DeepSpeedCommand) -> list[str]:
    """The argv that starts one rank per slot, each running `module --config FILE --section.key=value …`."""
    return [
        # Run as a module, so that the ranks use this interpreter whatever PATH says.
        # DeepSpeed would log a stopped rank as an error; the ranks and `deepcloze` report what happened.
        *(command.python, "-m", "deepspeed.launcher.runner", "--log_level=critical"),
        f"--master_port={command.master_port}",
        *([f"--master_addr={command.master_addr}"] if command.master_addr else []),
        *_resource_flags(command),
        *_program(command),
        *(("--config", str(command.config)) if command.config is not None else ()),
        *(f"--{key}={text}" for key, text in command.overrides.items()),
    ]


def _program(command: DeepSpeedCommand) -> list[str]:
    # DeepSpeed ignores --module with slurm, and with mpich applies it to a script of its own, which does not start.
    if command.hostfile is not None and command.launcher in ("slurm", "mpich"):
        return [str(REPOSITORY.joinpath(*command.module.split(".")).with_suffix(".py"))]
    return ["--module", command.module]


def _resource_flags(command: DeepSpeedCommand) -> list[str]:
    include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in command.slots.items())
    if command.hostfile is not None:
        return [
            f"--hostfile={command.hostfile}",
            # MPI launchers reject --include: their hostfile has just these slots.
            *([f"--include={include}"] if command.launcher in ("pdsh", "slurm") else []),
            *([f"--launcher={command.launcher}"] if command.launcher != "pdsh" else []),
            # Without --force_multi, DeepSpeed would run the ranks of a single remote host on this machine.
            *(["--force_multi"] if len(command.slots) == 1 else []),
        ]
    # An explicit empty hostfile, because DeepSpeed's default, /job/hostfile, may send a local run to other hosts.
    local = ["--hostfile=/dev/null"]
    if command.device == "cuda":
        return [*local, f"--include={include}"]
    # DeepSpeed counts one slot per NUMA node on a machine without GPUs, and checks --include against those.
    return [*local, f"--num_gpus={len(command.slots['localhost'])}"]
