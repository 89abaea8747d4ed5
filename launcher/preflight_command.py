"""`deepcloze preflight`: check the hosts of a launch, without one."""

from experiment.config import load_config
from experiment.errors import UserError
from experiment.process.own_process import raise_limit_of_open_files
from experiment.process.signals import handle_stop_signals, interrupt
from launcher.hosts.machine import Machine, launch_machine
from launcher.launch import warnings_left_to_rank0
from launcher.launch_plan import chosen_slots, plan_launch
from launcher.options import PreflightOptions, PretrainOptions
from launcher.preflight.run import check_hosts, require_hosts
from launcher.preflight.target import Target, target_of_hosts
from pretrain.config import PretrainConfig


def preflight_command(options: PreflightOptions) -> None:
    """Check the hosts of a launch and print a row for each.

    Raises UserError if one fails, unless `options.allow_missing`, and for anything else that would keep a run from
    starting.
    """
    raise_limit_of_open_files()
    with handle_stop_signals(interrupt):  # not to leave processes on other hosts
        machine = launch_machine()
        target = _target(options, machine)
        report = check_hosts(target, machine)
    print(report.text)
    require_hosts(report, target, options.allow_missing)


def _target(options: PreflightOptions, machine: Machine) -> Target:
    if options.config is None:
        if options.overrides:
            raise UserError(f"--{next(iter(options.overrides))} applies to a config: give --config too")
        return target_of_hosts(chosen_slots(options, machine), machine, options)
    launch = PretrainOptions(**options.model_dump())
    config = load_config(PretrainConfig, launch.config, launch.overrides)
    with warnings_left_to_rank0():
        return plan_launch(launch, config, machine).target
