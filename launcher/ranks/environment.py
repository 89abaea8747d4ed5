"""The environment variables of a launch: of DeepSpeed's launcher and of the ranks, here and on other hosts. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from experiment.errors import QUIET_VARIABLE, UserError
from experiment.process.own_process import LAUNCH_VARIABLE, python_path
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.machine import DeviceKind
from launcher.hosts.ssh import CONNECTION_OPTIONS

Launcher = Literal["pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich"]
"""The program that starts the ranks on other hosts."""

_FORWARDED = (
    *("WANDB_", "HF_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "MLFLOW_", "PYTHON"),
    *("DEEPCLOZE_SMTP_", "DEEPCLOZE_WEBHOOK_", "DEEPCLOZE_APPRISE_"),  # of alerts
    "TORCHINDUCTOR_CACHE_DIR",
    *(QUIET_VARIABLE, "DEEPCLOZE_RUN_SET"),
)
_OF_ONE_MACHINE = {"CUDA_VISIBLE_DEVICES"}  # the slots say it
_DEVICE = "DS_ACCELERATOR"  # if the user sets it, for all hosts
# DeepSpeed writes variables with these prefixes into command lines, where shells interpret their values.
_EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")

# On a CPU, tensors come from malloc. By default glibc maps and unmaps memory for each large one, and on small models
# the page faults cost more than the arithmetic. These settings make it keep and reuse freed memory.
GLIBC_TUNABLES = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_max=0"
)


def launch_environment(environ: Mapping[str, str], device: DeviceKind | None) -> dict[str, str]:
    """Return the variables that a launch adds for its ranks on all hosts. Ranks import the repository's modules, and
    nothing from the working directory, whatever files the user has there. Other variables set by the user are not
    changed. device: of the ranks if all run on this machine; None: DeepSpeed detects it on each host."""
    wanted = {"TOKENIZERS_PARALLELISM": "false"} | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})
    return _missing(environ, wanted) | {"PYTHONPATH": python_path(environ), "PYTHONSAFEPATH": "1"}


def host_environment(
    environ: Mapping[str, str], cores: int, ranks: int, device: DeviceKind, interface: str | None = None
) -> dict[str, str]:
    """Return the variables that a rank adds on its host. Variables that are set are not changed. ranks: on the host,
    which share its cores. interface: for connections to other hosts; None: not known, or there are none."""
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    if device == "cpu":
        wanted["GLIBC_TUNABLES"] = GLIBC_TUNABLES
    else:
        wanted["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # of nvidia-smi, which preflight and plans ask
    if interface is not None:  # NCCL takes a name without '=' for a prefix: eth1 would also mean eth10
        wanted |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return _missing(environ, wanted)


def _missing(environ: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if name not in environ}


def deepspeed_environment(environ: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of DeepSpeed's launcher, which the ranks on this machine inherit. CUDA_VISIBLE_DEVICES is
    removed: the slots already reflect it, and DeepSpeed sets it for the ranks."""
    return {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"} | dict(added)


def forwarded_environment(environ: Mapping[str, str], names: Iterable[str], user_text: str = "") -> dict[str, str]:
    """Return the variables of this process that ranks on other hosts get too. They may be secret: see `host_guard`.

    Variables of W&B, Hugging Face, OpenMP, NCCL, gloo, CUDA, MLflow, Python and alerts, unless the user's own
    `.deepspeed_env`, `user_text`, has them, and named ones; not PYTHONPATH, which the launch extends and DeepSpeed
    exports. Raises UserError for a named one that is not set.
    """
    for name in names:
        if name not in environ:
            raise UserError(f"--env: {name} is not set")
    chosen = {name for name in environ if name.startswith(_FORWARDED) or name == _DEVICE} - _OF_ONE_MACHINE
    chosen -= _user_lines(user_text).keys()
    return {name: environ[name] for name in sorted((chosen | set(names)) - {"PYTHONPATH"})}


def exported_text(added: Mapping[str, str], rendezvous: Rendezvous | None, launcher: Launcher, user_text: str) -> str:
    """Return the text of the file (DS_ENV_FILE) whose variables DeepSpeed exports on other hosts, in logged command
    lines. They are the added ones, the name of the launch and, if DeepSpeed does not set it, where the ranks meet.

    The file replaces the user's own `.deepspeed_env`, so the lines of that one, `user_text`, are included and take
    precedence. Comments and a leading `export` are removed: DeepSpeed would write them into shell commands.
    """
    exported = dict(added)
    if rendezvous is not None:
        exported[LAUNCH_VARIABLE] = rendezvous.launch
        if launcher != "pdsh" and rendezvous.address:  # with pdsh, DeepSpeed's launcher sets them
            exported |= {"MASTER_ADDR": rendezvous.address, "MASTER_PORT": str(rendezvous.port)}
    lines = {name: f"{name}={value}" for name, value in exported.items()}
    return "".join(f"{line}\n" for line in (lines | _user_lines(user_text)).values())


def _user_lines(user_text: str) -> dict[str, str]:
    given = (re.sub(r"^export\s+", "", line.strip()) for line in user_text.splitlines())
    return {line.partition("=")[0].strip(): line for line in given if "=" in line and not line.startswith("#")}


def remote_deepspeed_environment(
    environ: Mapping[str, str], added: Mapping[str, str], forwarded: Mapping[str, str]
) -> dict[str, str]:
    """Like `deepspeed_environment`, for ranks on other hosts: without the forwarded variables that DeepSpeed would
    write into command lines, or that are forwarded by their prefix; named ones, such as PATH, may be needed here, too.
    With options for the ssh processes of pdsh, which outlive it."""
    environment = deepspeed_environment(environ, added)
    removed = {name for name in forwarded if name.startswith(_FORWARDED + _EXPORTED_BY_DEEPSPEED)} - added.keys()
    kept = {name: value for name, value in environment.items() if name not in removed}
    return kept | {"PDSH_SSH_ARGS_APPEND": f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {CONNECTION_OPTIONS}".strip()}
