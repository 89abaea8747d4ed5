"""The requirements that preflight compares hosts with: of the ranks on each host and, with a config, of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiment.files import REPOSITORY
from experiment.run_files.checkpoints import checkpoint_step, complete_checkpoints, named_best
from experiment.run_files.retention import Retention
from experiment.run_files.run_folder import RunFolder
from experiment.storage import is_url
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Machine
from launcher.ranks.environment import Launcher, forwarded_environment
from launcher.ranks.placement import HostOptions, is_local
from pretrain.config import PretrainConfig
from pretrain.ds_configs import find_ds_config

# Of each parameter, in fp32. See `pretrain/training/checkpoint_tensors.py`.
_ENGINE_BYTES = 3 * 4  # weight and two moments of the optimizer
_MODEL_BYTES = 4  # in hf/
_AVERAGE_BYTES = 2 * 4  # in engine/ and hf-ema/


@dataclass(frozen=True)
class CacheNeeds:
    """Copies that hosts must make in `corpus.cache`: of corpora given as URLs. Hosts can read others where they are."""

    folder: str
    limit: float | None  # bytes of all copies
    copies: Mapping[str, int]  # folder of each copy -> its bytes

    @property
    def bytes(self) -> int:
        return sum(self.copies.values())

    @property
    def kept(self) -> tuple[str, ...]:
        """The folders whose files take no more space: existing copies, and with a limit the whole cache."""
        return tuple(self.copies) if self.limit is None else (self.folder,)


@dataclass(frozen=True)
class Target:
    """A launch that is to be checked."""

    slots: Slots
    project: str  # folder of the packages, the same on all hosts
    interfaces: Mapping[str, tuple[str, ...]]  # variable -> network interfaces that it names
    launcher: Launcher = "pdsh"
    host_environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables for ranks on other hosts
    uses_cpu: bool = False  # on hosts with GPUs too
    oversubscribe: bool = False
    folder: Path | None = None  # of the run; None: without a config
    files: tuple[Path, ...] = ()  # that must be the same on all hosts
    checkpoint_bytes: int = 0  # still to be written
    cache: CacheNeeds | None = None  # None: no corpus is a URL

    def peer_of(self, host: str) -> str | None:
        """Return the host that another one must reach: the first one, and for that the second."""
        return next((peer for peer in self.slots if peer != host), None)


def target_of_hosts(slots: Slots, machine: Machine, options: HostOptions) -> Target:
    """Return the requirements of any launch over these slots. Raises UserError for a name in `--env` that is not
    set."""
    names = [name.strip() for name in (options.env or "").split(",") if name.strip()]
    user_text = "" if is_local(slots) else machine.deepspeed_env_text
    return Target(
        slots=slots,
        project=str(REPOSITORY),
        interfaces=_named_interfaces(machine.environ),
        launcher=options.launcher,
        host_environment=forwarded_environment(machine.environ, names, user_text),
        uses_cpu=machine.environ.get("DS_ACCELERATOR") == "cpu",
        oversubscribe=options.oversubscribe,
    )


def target_of_run(
    hosts: Target,
    config: PretrainConfig,
    num_parameters: int,
    folder: RunFolder,
    first_step: int,
    cache: CacheNeeds | None = None,
) -> Target:
    """Add the requirements of a run. `config`: resolved. `first_step`: from which the run continues."""
    return replace(
        hosts,
        folder=folder.path,
        files=_required_files(config),
        checkpoint_bytes=_checkpoint_bytes(config, num_parameters, folder, first_step),
        cache=cache,
    )


def _named_interfaces(environ: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the interfaces that settings of gloo and NCCL name; without the prefixes and exclusions that NCCL
    accepts."""
    gloo, nccl = environ.get("GLOO_SOCKET_IFNAME", ""), environ.get("NCCL_SOCKET_IFNAME", "")
    found = {"GLOO_SOCKET_IFNAME": gloo, "NCCL_SOCKET_IFNAME": nccl[1:] if nccl.startswith("=") else ""}
    return {variable: tuple(names.split(",")) for variable, names in found.items() if names}


def _required_files(config: PretrainConfig) -> tuple[Path, ...]:
    """Return the files that stand for all that the ranks read: manifests of corpora have the checksums of the
    shards."""
    files = [Path(source) / "manifest.json" for source in config.corpus.sources if not is_url(source)]
    files.append(find_ds_config(config.engine.ds_config))
    if config.model.init_from is not None and Path(config.model.init_from).is_absolute():  # hosts download others
        files.append(Path(config.model.init_from) / "config.json")
    if config.model.added_tokens is not None:
        files.append(Path(config.model.added_tokens) / "tokenizer.json")
    return tuple(dict.fromkeys(files))


def _checkpoint_bytes(config: PretrainConfig, num_parameters: int, folder: RunFolder, first_step: int) -> int:
    """Return the bytes of the checkpoints that a run will still write: those it keeps, and one that is being written
    while they are there, less the ones that it has and will delete. Of `keep_every`, those after `first_step`.

    Each holds the weights and the two moments of Adam in fp32 and a Hugging Face folder; with `model.ema_decay`, the
    averaged weights in both.
    """
    per_parameter = _ENGINE_BYTES + _MODEL_BYTES + (_AVERAGE_BYTES if config.model.ema_decay is not None else 0)
    keep, steps = Retention(config.checkpoint.keep_last, config.checkpoint.keep_every), config.schedule.known_steps
    kept = keep.keep_last + (config.evaluation.best_metric is not None)  # the best one is kept too
    if keep.keep_every is not None and steps is not None:
        kept += max(0, steps // keep.keep_every - first_step // keep.keep_every)
    best = named_best(folder.checkpoints) if config.evaluation.best_metric is None else None  # of before: stays
    present = [checkpoint_step(path) for path in complete_checkpoints(folder.checkpoints) if path != best]
    deleted = sum(step <= first_step and not keep.is_milestone(step) for step in present)  # later ones are damaged
    return max(0, kept + 1 - deleted) * per_parameter * num_parameters
