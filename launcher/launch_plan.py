"""The plan of a launch: config, hosts and command, worked out without starting anything."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.config import dump_config
from experiment.errors import UserError
from experiment.formatting import format_parameters
from experiment.process.fast_imports import fast_imports
from experiment.run_files.checkpoints import complete_checkpoints
from experiment.run_files.run_folder import RunFolder
from experiment.storage import is_url
from launcher.hosts.guarded_hosts import Rendezvous
from launcher.hosts.hostfile import Slots, allocated_hosts, read_hostfile
from launcher.hosts.machine import Machine
from launcher.options import PretrainOptions
from launcher.preflight.run import preflight_problems
from launcher.preflight.target import CacheNeeds, Target, target_of_hosts, target_of_run
from launcher.ranks.deepspeed_command import DeepSpeedCommand, command_on_hosts, command_on_this_machine
from launcher.ranks.environment import launch_environment
from launcher.ranks.microbatch import max_halvings, scaled_microbatch
from launcher.ranks.placement import HostOptions, check_launcher, is_local, place_ranks
from launcher.supervision.attempt import LaunchSettings, Layout
from pretrain.config import ModelConfig, PretrainConfig

if TYPE_CHECKING:
    from pretrain.resolve import ResolvedRun

_MAX_RESTARTS_ON_HOSTS = 10
_SPECIAL = re.compile(r"[^\w@+=:,./~ -]")  # to shells or, as %h, to pdsh
_SPECIAL_OR_SPACE = re.compile(r"[^\w@+=:,./~-]")


@dataclass(frozen=True)
class LaunchPlan:
    """Everything needed to start a run, or to show how it would start."""

    options: PretrainOptions
    config: PretrainConfig  # resolved, with absolute paths
    folder: RunFolder
    slots: Slots
    machine: Machine
    target: Target  # requirements for preflight
    summary: str = ""  # model and engine, in words
    identity: Mapping[str, Any] = field(default_factory=dict)  # see `pretrain.run_identity`
    held_out: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the evaluation corpora, by name
    saved_model: ModelConfig | None = None  # section `model` to build the model from the checkpoint to continue from

    @property
    def local(self) -> bool:
        """Whether all ranks run on this machine."""
        return is_local(self.slots)

    @property
    def added_environment(self) -> Mapping[str, str]:
        """The variables that the launch adds for all ranks."""
        return launch_environment(self.machine.environ, self.machine.devices.kind if self.local else None)

    def settings(self) -> LaunchSettings:
        """Return the settings with which the supervisor starts the ranks."""
        if (max_restarts := self.options.max_restarts) is None:
            max_restarts = 0 if self.local else _MAX_RESTARTS_ON_HOSTS
        return LaunchSettings(
            self.folder,
            self.slots,
            self.command,
            local=self.local,
            launcher=self.options.launcher,
            host_environment=self.target.host_environment,
            max_restarts=max_restarts,
            max_halvings=max_halvings(self.config),
            tracking=self.config.tracking,
            hang_seconds=self.config.health.hang_seconds,
            preflight_problems=partial(preflight_problems, self.target),
        )

    def command(self, layout: Layout, rendezvous: Rendezvous | None = None) -> DeepSpeedCommand:
        """Return the command that starts the ranks of a layout. They read a copy of the config: the user may edit
        the file for another run. `rendezvous`: None: unknown, or all ranks run here."""
        config = scaled_microbatch(self.config, -layout.microbatch_halvings)
        began = self.folder.metrics.exists() or complete_checkpoints(self.folder.checkpoints)
        if layout.restarted and config.run.resume == "never" and began:  # by this launch
            config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
        config_file = self.folder.logs / "launch.yaml"
        # The shell of another host would parse the overrides again, so they are passed in a file there.
        arguments = ("--config", str(config_file))
        if self.local:
            start = command_on_this_machine(layout.slots, arguments, self.machine)
        else:
            start = command_on_hosts(
                layout.slots,
                arguments,
                self.machine,
                self.folder.logs,
                self.options.launcher,
                self.target.host_environment,
                rendezvous,
            )
        return replace(start, files={**start.files, config_file: dump_config(config)})


def plan_launch(
    options: PretrainOptions, config: PretrainConfig, machine: Machine, slots: Slots | None = None
) -> LaunchPlan:
    """Resolve the config and decide which ranks run where. Reads files; writes and starts nothing.

    config: as the options say. slots: default: those that the options select. Raises UserError for anything that would
    keep the run from starting.
    """
    if slots is None:
        slots = chosen_slots(options, machine)
    local = is_local(slots)

    with fast_imports():
        from pretrain.engine.deepspeed_settings import check_device_support  # imports torch and DeepSpeed

    run = resolve_run(config, sum(map(len, slots.values())))
    if options.autotune and run.deepspeed.offload == "nvme":
        raise UserError(f"--autotune: {config.engine.ds_config} offloads to NVMe, where a trial would leave its files")
    if local:  # other hosts have other devices: their ranks check
        check_device_support(run.deepspeed)
    else:
        _check_paths(run.folder)
    hosts = target_of_hosts(slots, machine, options)
    target = target_of_run(hosts, run.config, run.num_parameters, run.folder, run.resume_plan.step, _cache_needs(run))
    held_out = {name: corpus.fingerprint for name, corpus in run.held_out.items()}
    checkpoint, source = run.resume_plan.checkpoint, run.model_source
    saved_model = source if checkpoint is not None and source.init_from == str(checkpoint / "hf") else None
    return LaunchPlan(
        options, run.config, run.folder, slots, machine, target, _summary(run), run.identity, held_out, saved_model
    )


def local_command(options: PretrainOptions, slots: Slots, machine: Machine) -> DeepSpeedCommand:
    """Return the command for ranks on this machine that read the config of the options."""
    overrides = (f"--{key}={text}" for key, text in options.overrides.items())
    arguments = ("--config", str(Path(options.config).absolute()), *overrides)
    return command_on_this_machine(slots, arguments, machine)


def _summary(run: "ResolvedRun") -> str:
    sequences = run.config.batch.sequences
    return (
        f"{format_parameters(run.num_parameters)}, {run.deepspeed.precision}, ZeRO stage "
        f"{run.deepspeed.zero_stage}, {sequences:,} sequences per step"
    )


def resolve_run(config: PretrainConfig, ranks: int, **options: Any) -> "ResolvedRun":
    """Like `resolve`, with its options, but retry for an active run, which plans and preflight may read: it deletes
    checkpoints."""
    with fast_imports():
        from pretrain.resolve import resolve

    try:
        return resolve(config, ranks, **options)
    except (OSError, UserError):
        if not RunFolder(Path(config.run.dir)).owner.exists():
            raise
        return resolve(config, ranks, **options)


def _cache_needs(run: "ResolvedRun") -> CacheNeeds | None:
    """Return the needs of the cache. Raises UserError if `corpus.cache_gib` is less than the corpora take."""
    config = run.config.corpus
    if config.cache is None or not any(map(is_url, config.sources)):
        return None
    from pretrain.corpus.cache import CorpusCache, read_description

    cache = CorpusCache(Path(config.cache))
    copies = {
        str(cache.folder_of(source, read_description(source))): sum(shard.bytes for shard in corpus.manifest.shards)
        for source, corpus in zip(config.all_sources, run.all_corpora, strict=True)
        if is_url(source)
    }
    needs = CacheNeeds(config.cache, config.cache_bytes, copies)
    if needs.limit is not None and needs.bytes > needs.limit:
        raise UserError(
            f"corpus.cache_gib is {config.cache_gib:g}, but the corpora take {needs.bytes / 2**30:,.3f} GiB"
        )
    return needs


def _check_paths(folder: RunFolder) -> None:
    """Raise UserError for paths that mean something else on other hosts, where DeepSpeed does not quote them."""
    for name, path, special, allowed in (
        ("run.dir", folder.path, _SPECIAL, "letters, digits, spaces"),
        ("working directory", Path.cwd(), _SPECIAL_OR_SPACE, "letters, digits"),
        ("Python", sys.executable, _SPECIAL_OR_SPACE, "letters, digits"),
    ):
        if found := special.search(str(path)):
            raise UserError(
                f"{name}: {path} contains {found[0]!r}, which the shells of other hosts interpret; choose a path of "
                f"{allowed} and any of _@+=:,./~-"
            )


def chosen_slots(options: HostOptions, machine: Machine) -> Slots:
    """Return the slots that the options select, of the hostfile, the job or this machine. Raises UserError."""
    hosts = read_hostfile(options.hostfile) if options.hostfile else allocated_hosts(machine.environ)
    slots = place_ranks(machine.devices, options, hosts)
    if not is_local(slots):
        check_launcher(options.launcher, slots, machine.environ)
    return slots
