"""`deepcloze pretrain`: plan a launch, carry it out and report how it ended."""

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiment.config import dump_config, load_config
from experiment.errors import StoppedError
from experiment.files import write_text
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from launcher.allocation import allocated_hosts
from launcher.deepspeed_command import DeepSpeedCommand, deepspeed_argv
from launcher.environment import deepspeed_environment, launch_environment, remote_environment_text
from launcher.hostfile import Slots, hostfile_text, read_hostfile
from launcher.machine import Machine, inspect_machine, select_accelerator
from launcher.options import PretrainOptions
from launcher.placement import is_local, name_localhost, place_ranks
from launcher.preflight.run import check_hosts, require_hosts
from launcher.preflight.target import Target, target_of_hosts, target_of_run
from launcher.signal_handlers import handle_stop_signals, interrupt
from launcher.supervisor import supervise
from pretrain.config import PretrainConfig

_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LaunchPlan:
    """Everything needed to start a run, or to show how it would start."""

    config: PretrainConfig  # resolved, with absolute paths
    folder: RunFolder
    slots: Slots
    argv: tuple[str, ...]  # the `deepspeed` command
    added_environment: Mapping[str, str]  # variables that the launch adds for all ranks
    environment: Mapping[str, str]  # all variables of the `deepspeed` process
    files: Mapping[Path, str]  # path -> text: what ranks on other hosts read, written before the start
    target: Target  # what preflight checks the hosts for


def launch_pretraining(options: PretrainOptions) -> None:
    """Pretrain, one process per slot, and return when the run is done; or print the plan, for a dry run.

    Raises UserError for anything that would keep the ranks from starting, StoppedError for a run that stopped early but
    can resume, KeyboardInterrupt for a signal before the ranks start, and SystemExit for a run that failed (with a
    message) or that the ranks rejected (rank 0 prints why).
    """
    start_time = time.time()
    with handle_stop_signals(interrupt):
        config = load_config(PretrainConfig, options.config, options.overrides)
        machine = inspect_machine()
        select_accelerator(machine.devices)
        if options.dry_run:
            print(describe_plan(plan_launch(options, config, machine)))
            return
        with warnings_left_to_rank0():
            plan = plan_launch(options, config, machine)
            if not is_local(plan.slots):
                plan = _plan_without_failed_hosts(plan, options, config, machine)
        launch(plan, start_time)


def _plan_without_failed_hosts(
    plan: LaunchPlan, options: PretrainOptions, config: PretrainConfig, machine: Machine
) -> LaunchPlan:
    """The plan for the hosts that pass preflight. Raises UserError if one fails, unless `options.allow_missing`."""
    report = check_hosts(plan.target, machine, only_failed=True)
    print(report.text, file=sys.stderr, flush=True)
    passed = require_hosts(report, plan.target, options.allow_missing)
    return plan if passed == plan.slots else plan_launch(options, config, machine, name_localhost(passed))


def plan_launch(
    options: PretrainOptions, config: PretrainConfig, machine: Machine, slots: Slots | None = None
) -> LaunchPlan:
    """Resolve the config and decide which ranks run where. Reads files; writes and starts nothing.

    Args:
        options: what the user asked for; `dry_run` is ignored.
        config: what `options.config` and `options.overrides` say.
        machine: the machine to launch from; call `select_accelerator` for its devices first.
        slots: those to use; default: those that the options select.

    Raises UserError for anything that would keep the run from starting.
    """
    if slots is None:
        hosts = read_hostfile(options.hostfile) if options.hostfile else allocated_hosts(machine.environ)
        slots = place_ranks(machine.devices, options, hosts)

    from pretrain.engine.deepspeed_settings import check_device_support  # imports torch and DeepSpeed
    from pretrain.resolve import resolve

    run = resolve(config, world_size=sum(map(len, slots.values())))
    local = is_local(slots)
    if local:  # other hosts have other devices: their ranks check
        check_device_support(run.deepspeed)

    command = DeepSpeedCommand(
        python=sys.executable,
        module="launcher.start_rank",
        # The shell of another host would parse the overrides again, so they are passed in a file there.
        config=Path(options.config).absolute() if local else run.folder.logs / "launch.yaml",
        overrides=options.overrides if local else {},
        slots=slots,
        device=machine.devices.kind,
        master_port=machine.find_port(),
        hostfile=None if local else run.folder.logs / "hostfile",
    )
    added = launch_environment(machine.environ, machine.devices.kind if local else None, _REPOSITORY)
    environment = deepspeed_environment(machine.environ, added)
    files: Mapping[Path, str] = {}
    if not local:
        environment["DS_ENV_FILE"] = str(run.folder.logs / "worker.env")
        files = _files_for_hosts(run.folder, run.config, slots, machine, added)
    hosts_target = target_of_hosts(slots, command.master_port, machine.environ, options.oversubscribe)
    target = target_of_run(hosts_target, run.config, run.num_parameters, run.folder)
    return LaunchPlan(run.config, run.folder, slots, tuple(deepspeed_argv(command)), added, environment, files, target)


def _files_for_hosts(
    folder: RunFolder, config: PretrainConfig, slots: Slots, machine: Machine, added: Mapping[str, str]
) -> Mapping[Path, str]:
    """What DeepSpeed's launcher and ranks on other hosts read. `added`: to the environment of all ranks."""
    user_text = "\n".join(path.read_text(encoding="utf-8") for path in machine.deepspeed_env_files)
    return {
        folder.logs / "hostfile": hostfile_text(slots),
        folder.logs / "launch.yaml": dump_config(config),
        folder.logs / "worker.env": remote_environment_text(machine.environ, added, user_text),
    }


def describe_plan(plan: LaunchPlan) -> str:
    """The plan as text: the config, the added environment and the command."""
    variables = "\n".join(f"{name}={shlex.quote(value)}" for name, value in plan.added_environment.items())
    config = dump_config(plan.config)
    return f"# config\n{config}\n# added to the environment\n{variables}\n\n# command\n{shlex.join(plan.argv)}"


def launch(plan: LaunchPlan, start_time: float) -> None:
    """Start the ranks and wait until they have exited. Raises StoppedError and SystemExit as `launch_pretraining`.

    `start_time`: `time.time()` when the user started the launch.
    """
    open_run_folder(plan.folder.path)
    for path, text in plan.files.items():
        write_text(path, text)
    result = supervise(plan.folder, plan.argv, plan.environment, plan.slots, start_time)
    match result.outcome:
        case Outcome.DONE:
            return
        case Outcome.STOPPED:
            raise StoppedError(result.message)
        case Outcome.REFUSED:
            sys.exit(result.outcome.exit_code)  # rank 0 has printed the message
        case Outcome.FAILED:
            sys.exit(f"deepcloze: the run failed: {result.message}")


@contextlib.contextmanager
def warnings_left_to_rank0() -> Iterator[None]:
    """Suppress the warnings of planning: rank 0 runs the same checks and logs them."""
    loggers = [logging.getLogger(package) for package in ("experiment", "pretrain")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
