"""The `deepspeed` command line of a launch. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.hostfile import Slots
from launcher.machine import DeviceKind


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


def deepspeed_argv(command: DeepSpeedCommand) -> list[str]:
    """The argv that starts one rank per slot, each running `module --config FILE --section.key=value …`."""
    return [
        # Run as a module, so that the ranks use this interpreter whatever PATH says.
        # DeepSpeed would log a stopped rank as an error; the ranks and `deepcloze` report what happened.
        *(command.python, "-m", "deepspeed.launcher.runner", "--log_level=critical"),
        f"--master_port={command.master_port}",
        *_resource_flags(command),
        *("--module", command.module),
        *(("--config", str(command.config)) if command.config is not None else ()),
        *(f"--{key}={text}" for key, text in command.overrides.items()),
    ]


def _resource_flags(command: DeepSpeedCommand) -> list[str]:
    include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in command.slots.items())
    if command.hostfile is not None:
        # Without --force_multi, DeepSpeed would run the ranks of a single remote host on this machine.
        return [
            f"--hostfile={command.hostfile}",
            f"--include={include}",
            *(["--force_multi"] if len(command.slots) == 1 else []),
        ]
    # An explicit empty hostfile, because DeepSpeed's default, /job/hostfile, may send a local run to other hosts.
    local = ["--hostfile=/dev/null"]
    if command.device == "cuda":
        return [*local, f"--include={include}"]
    # DeepSpeed counts one slot per NUMA node on a machine without GPUs, and checks --include against those.
    return [*local, f"--num_gpus={len(command.slots['localhost'])}"]
