"""The `deepspeed` command line of a launch. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.hostfile import Slots
from launcher.placement import DeviceKind


@dataclass(frozen=True)
class LaunchSpec:
    """All that the command line of one launch depends on."""

    python: str  # the interpreter that runs the launcher and the ranks
    module: str  # what every rank runs
    config: Path  # absolute
    slots: Slots
    device: DeviceKind
    master_port: int
    overrides: Mapping[str, str] = field(default_factory=dict)  # dotted config key -> raw text
    hostfile: Path | None = None  # absolute; None: this machine alone


def deepspeed_argv(spec: LaunchSpec) -> list[str]:
    """The argv that starts one rank per slot, each running `module --config FILE --section.key=value …`."""
    return [
        # As a module, so that the ranks get this very interpreter whatever PATH says.
        # It would log a rank that stopped as an error; what happened is told by the ranks and by `deepcloze`.
        *(spec.python, "-m", "deepspeed.launcher.runner", "--log_level=critical", f"--master_port={spec.master_port}"),
        *_resources(spec),
        *("--module", spec.module, "--config", str(spec.config)),
        *(f"--{key}={text}" for key, text in spec.overrides.items()),
    ]


def _resources(spec: LaunchSpec) -> list[str]:
    include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in spec.slots.items())
    if spec.hostfile is not None:
        # One remote host would otherwise be taken for this machine.
        return [
            f"--hostfile={spec.hostfile}",
            f"--include={include}",
            *(["--force_multi"] if len(spec.slots) == 1 else []),
        ]
    # No file, so that a /job/hostfile, DeepSpeed's default, does not send a local run elsewhere.
    local = ["--hostfile=/dev/null"]
    if spec.device == "cuda":
        return [*local, f"--include={include}"]
    # DeepSpeed counts a machine without GPUs as one slot per NUMA node, and --include is checked against those.
    return [*local, f"--num_gpus={len(spec.slots['localhost'])}"]
