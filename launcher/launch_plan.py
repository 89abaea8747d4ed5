"""What a launch would start: the config, the hosts and the command, worked out without starting anything."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiment.config import dump_config
from experiment.run_folder import RunFolder
from launcher.allocation import allocated_hosts
from launcher.attempt import Command, Launch, Layout, Rendezvous
from launcher.deepspeed_command import DeepSpeedCommand, deepspeed_argv
from launcher.environment import (
    deepspeed_environment,
    forwarded_environment,
    launch_environment,
    remote_deepspeed_environment,
    remote_environment_text,
)
from launcher.host_guard import LAUNCH_VARIABLE
from launcher.hostfile import Slots, hostfile_text, read_hostfile
from launcher.machine import Machine
from launcher.microbatch import halved_microbatch, max_halvings
from launcher.options import PretrainOptions
from launcher.placement import check_launcher, is_local, place_ranks
from pretrain.config import PretrainConfig

_REPOSITORY = Path(__file__).resolve().parent.parent
_MAX_RESTARTS_ON_HOSTS = 10


@dataclass(frozen=True)
class LaunchPlan:
    """Everything needed to start a run, or to show how it would start."""

    options: PretrainOptions
    config: PretrainConfig  # resolved, with absolute paths
    folder: RunFolder
    slots: Slots
    machine: Machine
    added_environment: Mapping[str, str]  # variables that the launch adds for all ranks

    @property
    def local(self) -> bool:
        """Whether all ranks run on this machine."""
        return is_local(self.slots)

    def launch(self) -> Launch:
        """What the supervisor starts. Raises UserError for an --env that is not set."""
        max_restarts = self.options.max_restarts
        if max_restarts is None:
            max_restarts = 0 if self.local else _MAX_RESTARTS_ON_HOSTS
        names = [name.strip() for name in (self.options.env or "").split(",") if name.strip()]
        return Launch(
            self.folder,
            self.slots,
            self.command,
            local=self.local,
            host_environment=forwarded_environment(self.machine.environ, names),
            max_restarts=max_restarts,
            max_halvings=max_halvings(self.config),
        )

    def command(self, layout: Layout, rendezvous: Rendezvous | None = None) -> Command:
        """How DeepSpeed starts the ranks of a layout. Without a rendezvous, for other hosts: as far as it is known."""
        as_written = self.local and layout.microbatch_halvings == 0
        config_file = self.folder.logs / "launch.yaml"
        command = DeepSpeedCommand(
            python=sys.executable,
            module="launcher.start_rank",
            # The shell of another host would parse the overrides again, so they are passed in a file there.
            config=Path(self.options.config).absolute() if as_written else config_file,
            overrides=self.options.overrides if as_written else {},
            slots=layout.slots,
            device=self.machine.devices.kind,
            master_port=rendezvous.port if rendezvous else self.machine.find_port(),
            hostfile=None if self.local else self.folder.logs / "hostfile",
            launcher=self.options.launcher,
            master_addr=rendezvous.address if rendezvous else None,
        )
        files: dict[Path, str] = {}
        if not as_written:
            files[config_file] = dump_config(halved_microbatch(self.config, layout.microbatch_halvings))
        if self.local:
            environment = deepspeed_environment(self.machine.environ, self.added_environment)
        else:
            environment = remote_deepspeed_environment(self.machine.environ, self.added_environment)
            environment["DS_ENV_FILE"] = str(self.folder.logs / "worker.env")
            files |= self._files_for_hosts(layout.slots, command, rendezvous)
        return Command(tuple(deepspeed_argv(command)), environment, files)

    def _files_for_hosts(
        self, slots: Slots, command: DeepSpeedCommand, rendezvous: Rendezvous | None
    ) -> Mapping[Path, str]:
        """What DeepSpeed's launcher reads to start ranks on other hosts."""
        exported = dict(self.added_environment)
        if rendezvous is not None:
            exported[LAUNCH_VARIABLE] = rendezvous.launch
            if command.launcher != "pdsh" and rendezvous.address:  # DeepSpeed tells it with pdsh only
                exported |= {"MASTER_ADDR": rendezvous.address, "MASTER_PORT": str(rendezvous.port)}
        user_text = "\n".join(path.read_text(encoding="utf-8") for path in self.machine.deepspeed_env_files)
        return {
            self.folder.logs / "hostfile": hostfile_text(slots),
            self.folder.logs / "worker.env": remote_environment_text(exported, user_text),
        }


def plan_launch(options: PretrainOptions, config: PretrainConfig, machine: Machine) -> LaunchPlan:
    """Resolve the config and decide which ranks run where. Reads files; writes and starts nothing.

    Args:
        options: what the user asked for; `dry_run` is ignored.
        config: what `options.config` and `options.overrides` say.
        machine: the machine to launch from; call `select_accelerator` for its devices first.

    Raises UserError for anything that would keep the run from starting.
    """
    hosts = read_hostfile(options.hostfile) if options.hostfile else allocated_hosts(machine.environ)
    slots = place_ranks(machine.devices, options, hosts)
    local = is_local(slots)
    if not local:
        check_launcher(options.launcher, slots)

    from pretrain.engine.deepspeed_settings import check_device_support  # imports torch and DeepSpeed
    from pretrain.resolve import resolve

    run = resolve(config, world_size=sum(map(len, slots.values())))
    if local:  # other hosts have other devices: their ranks check
        check_device_support(run.deepspeed)
    added = launch_environment(machine.environ, machine.devices.kind if local else None, _REPOSITORY)
    return LaunchPlan(options, run.config, run.folder, slots, machine, added)
