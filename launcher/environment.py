"""The environment variables of a launch: of DeepSpeed's launcher and of the ranks, here and on other hosts. Pure."""

from collections.abc import Mapping
from pathlib import Path

from launcher.machine import DeviceKind

# On a CPU, tensors come from malloc. By default glibc maps and unmaps memory for each large one, and on small models
# the page faults cost more than the arithmetic. These settings make it keep and reuse freed memory.
GLIBC_TUNABLES = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_max=0"
)


def launch_environment(environ: Mapping[str, str], device: DeviceKind | None, root: Path) -> dict[str, str]:
    """The variables that a launch adds for its ranks on all hosts. Variables set by the user are not changed.

    Args:
        environ: the launcher's own environment.
        device: what the ranks compute on if all run on this machine; None: DeepSpeed finds out on each host.
        root: the repository, added to PYTHONPATH so that the ranks can import it from any folder.
    """
    wanted = {"TOKENIZERS_PARALLELISM": "false"} | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})
    added = _missing(environ, wanted)
    path = [entry for entry in environ.get("PYTHONPATH", "").split(":") if entry]
    if str(root) not in path:
        added["PYTHONPATH"] = ":".join([str(root), *path])
    return added


def host_environment(environ: Mapping[str, str], cores: int, ranks: int, device: DeviceKind) -> dict[str, str]:
    """The variables that a rank adds on its host. Those that are set are not changed.

    Args:
        environ: the environment that the rank was started with.
        cores: CPU cores of the host.
        ranks: ranks on the host, which share its cores.
        device: what they compute on.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    if device == "cpu":
        wanted["GLIBC_TUNABLES"] = GLIBC_TUNABLES
    return _missing(environ, wanted)


def _missing(environ: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if name not in environ}


def deepspeed_environment(environ: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's launcher, which the ranks on this machine inherit.

    CUDA_VISIBLE_DEVICES is removed: the slots already reflect it, and DeepSpeed, which sets it for each rank, would
    only warn that it ignores the value.
    """
    return {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"} | dict(added)


def remote_environment_text(environ: Mapping[str, str], added: Mapping[str, str], user_text: str = "") -> str:
    """The text of the file (DS_ENV_FILE) whose variables DeepSpeed exports on other hosts.

    It contains the variables that the launch adds and the settings of gloo and NCCL, such as the network interface
    (DeepSpeed forwards NCCL's from a machine with GPUs only). The file replaces the user's own `.deepspeed_env`, so the
    lines of that one, `user_text`, are included and take precedence. The values appear in logged command lines, so
    other variables, which may be secret, are left out.
    """
    forwarded = {name: value for name, value in environ.items() if name.startswith(("GLOO_", "NCCL_"))} | dict(added)
    user_lines = {line.partition("=")[0].strip(): line.strip() for line in user_text.splitlines() if "=" in line}
    lines = {name: f"{name}={value}" for name, value in forwarded.items()}
    return "".join(f"{line}\n" for line in (lines | user_lines).values())
