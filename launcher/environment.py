"""Which environment variables reach the ranks. Pure."""

from collections.abc import Mapping
from pathlib import Path

from launcher.placement import DeviceKind

# Tensors of a CPU run come from malloc. By default glibc maps and unmaps large blocks for each of them, and the page
# faults cost more than the arithmetic on small models; with these it keeps what it has.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_max=0"


def worker_environment(
    environ: Mapping[str, str], cores: int, ranks: int, device: DeviceKind, root: Path
) -> dict[str, str]:
    """The variables that a launch adds for its ranks. What the user has set stays as it is.

    Args:
        environ: the launcher's own environment.
        cores: CPU cores of a host.
        ranks: ranks that share them.
        device: what the ranks compute on.
        root: the repository, made importable wherever the ranks start.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        wanted |= {"DS_ACCELERATOR": "cpu", "GLIBC_TUNABLES": KEEP_MEMORY}
    added = {name: value for name, value in wanted.items() if name not in environ}
    path = [entry for entry in environ.get("PYTHONPATH", "").split(":") if entry]
    if str(root) not in path:
        added["PYTHONPATH"] = ":".join([str(root), *path])
    return added


def launcher_environment(environ: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """The environment of `deepspeed` itself, which the ranks on this machine inherit.

    CUDA_VISIBLE_DEVICES is left out: the slots were chosen from it, and DeepSpeed, which sets it for each rank, would
    only report that it ignores it.
    """
    return {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"} | dict(added)


def remote_environment_file(environ: Mapping[str, str], added: Mapping[str, str], user_text: str = "") -> str:
    """The text of the file (DS_ENV_FILE) from which DeepSpeed exports variables on other hosts.

    `user_text` is what the user's own `.deepspeed_env` says, which the file stands in for: it is kept and has the last
    word. Besides what the launch adds, gloo's settings travel, such as the network interface (DeepSpeed forwards NCCL's
    by itself). The values become part of logged command lines, so nothing secret is passed on.
    """
    travelling = {name: value for name, value in environ.items() if name.startswith("GLOO_")} | dict(added)
    users = {line.partition("=")[0].strip(): line.strip() for line in user_text.splitlines() if "=" in line}
    ours = {name: f"{name}={value}" for name, value in travelling.items()}
    return "".join(f"{line}\n" for line in (ours | users).values())
