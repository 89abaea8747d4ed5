"""`deepcloze pretrain`: plan a launch, check its hosts, carry it out and report how it ended.

`deepcloze preflight`: only check its hosts.
"""

import contextlib
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from experiment.config import dump_config, load_config
from experiment.errors import StoppedError, UserError, inform, is_quiet, notify
from experiment.process.own_process import raise_limit_of_open_files
from experiment.process.signals import handle_stop_signals, interrupt
from experiment.run_files.checkpoints import checkpoints_to_resume, completed_saves
from experiment.run_files.mirror import Mirror
from experiment.run_files.outcome_file import Outcome
from experiment.run_files.run_folder import RunFolder, check_not_moved, check_run_folder, open_run_folder
from experiment.run_files.run_lock import Renewal, check_unlocked, lock_run
from experiment.storage import StorageError
from launcher.autotune import autotune
from launcher.hosts.hostfile import Slots
from launcher.hosts.machine import Machine, launch_machine
from launcher.launch_messages import announce_checks, announce_done, announce_failure, announce_stop
from launcher.launch_plan import LaunchPlan, chosen_slots, local_command, plan_launch
from launcher.options import PreflightOptions, PretrainOptions
from launcher.preflight.checks import lack_of_space
from launcher.preflight.run import check_hosts, require_hosts
from launcher.preflight.target import Target, target_of_hosts
from launcher.ranks.placement import is_local, name_localhost
from launcher.supervision.attempt import LaunchSettings, Layout
from launcher.supervision.rank_processes import HeldRanks, held_ranks
from launcher.supervision.supervisor import supervise
from pretrain.config import PretrainConfig
from pretrain.restore import restore_run


def launch_pretraining(options: PretrainOptions, start_time: float | None = None) -> None:
    """Pretrain, one process per slot, and return when the run is done; or print the plan, for a dry run.

    start_time: since when the time of the first attempt counts, as `time.time()`; default: now.

    Raises UserError for anything that would keep the ranks from starting, StoppedError for a run that stopped early but
    can resume, KeyboardInterrupt for a signal before the ranks begin, and SystemExit for a run that failed (with a
    message) or that the ranks rejected (rank 0 prints why).
    """
    checked_at = time.time()
    start_time = checked_at if start_time is None else start_time
    if options.profile:
        options = options.model_copy(update={"overrides": {**options.overrides, "run.profile": "true"}})
    raise_limit_of_open_files()
    with handle_stop_signals(interrupt):
        config = load_config(PretrainConfig, options.config, options.overrides)
        folder = RunFolder(Path(config.run.dir).absolute())
        check_not_moved(options.config, options.overrides, folder)
        machine = launch_machine()
        if options.dry_run:
            print(_describe_plan(plan_launch(options, config, machine)))
            return
        # Before the plan and preflight: a run that is active deletes checkpoints, and its devices are busy.
        dead_owner = check_unlocked(folder)
        _restore_for_plan(config, folder, dead_owner)
        slots = chosen_slots(options, machine)
        announce_checks(options.config, slots)
        with _ranks_started_early(options, slots, machine, start_time) as held:
            with warnings_left_to_rank0():
                plan = plan_launch(options, config, machine, slots)  # imports libraries, which takes seconds
                if plan.local:
                    _warn_of_full_disk(plan)  # on hosts, preflight checks it
                else:
                    plan = _plan_without_failed_hosts(plan)
                    if plan.slots != slots:
                        announce_checks(options.config, plan.slots)
            if options.autotune:
                plan = autotune(plan, dead_owner)
            if held is not None:
                _check_unchanged(options, config)
            else:  # the copy that the ranks read has all keys
                for warning in config.warnings_of_unset_keys():
                    notify(f"warning: {warning}")
            launch = replace(
                plan.settings(), start_time=start_time, checked_at=checked_at, dead_owner=dead_owner, held=held
            )
            run_launch(launch, plan.summary)


def preflight_command(options: PreflightOptions) -> None:
    """Check the hosts of a launch and print a row for each.

    Raises UserError if one fails, unless `options.allow_missing`, and for anything else that would keep a run from
    starting.
    """
    raise_limit_of_open_files()
    with handle_stop_signals(interrupt):  # not to leave processes on other hosts
        machine = launch_machine()
        target = _preflight_target(options, machine)
        report = check_hosts(target, machine)
    print(report.text)
    require_hosts(report, target, options.allow_missing)


def _preflight_target(options: PreflightOptions, machine: Machine) -> Target:
    if options.config is None:
        if options.overrides:
            raise UserError(f"--{next(iter(options.overrides))} applies to a config: give --config too")
        return target_of_hosts(chosen_slots(options, machine), machine, options)
    launch = PretrainOptions(**options.model_dump())
    config = load_config(PretrainConfig, launch.config, launch.overrides)
    with warnings_left_to_rank0():
        return plan_launch(launch, config, machine).target


def _warn_of_full_disk(plan: LaunchPlan) -> None:
    """Warn if checkpoints will not fit on the disk of the run folder, which this creates."""
    free = shutil.disk_usage(open_run_folder(plan.folder.path).path).free
    if lack := lack_of_space(free, plan.target):
        notify(f"warning: {lack}: free space, or lower checkpoint.keep_last")


def _restore_for_plan(config: PretrainConfig, folder: RunFolder, dead_owner: Renewal | None) -> None:
    """Copy the run from its mirror if the plan may need its checkpoint: the model or run that it began with may have
    been on a host that is lost. Otherwise rank 0 copies it. Raises UserError and OSError."""
    url = config.checkpoint.mirror
    needed = config.model.init_from is not None or config.run.parent is not None
    if url is None or not needed or checkpoints_to_resume(folder.checkpoints):
        return
    check_run_folder(folder, "pretraining run")
    try:
        if Mirror(url).complete():
            with lock_run(open_run_folder(folder.path), dead=dead_owner):
                restore_run(config, lambda: None)
    except StorageError as error:  # this machine may have no access
        notify(f"warning: the run is not copied from {url} before the checks: {error}")


def _ranks_started_early(
    options: PretrainOptions, slots: Slots, machine: Machine, start_time: float
) -> contextlib.AbstractContextManager[HeldRanks | None]:
    """Return the ranks of a launch on this machine, which import their libraries while the launch is checked."""
    if not is_local(slots) or options.autotune:  # others depend on the plan
        return contextlib.nullcontext()
    return held_ranks(local_command(options, slots, machine), start_time)


def _check_unchanged(options: PretrainOptions, config: PretrainConfig) -> None:
    """Raise UserError if the config file no longer has the values that were checked."""
    if load_config(PretrainConfig, options.config, options.overrides) != config:
        raise UserError(f"{options.config} was changed while it was checked; run the same command again")


def _plan_without_failed_hosts(plan: LaunchPlan) -> LaunchPlan:
    """Return the plan for the hosts that pass preflight. Raises UserError if one fails, unless `--allow_missing` is
    given."""
    report = check_hosts(plan.target, plan.machine, only_failed=True)
    if report.passed != plan.slots or not is_quiet():
        print(report.text, file=sys.stderr, flush=True)
    passed = require_hosts(report, plan.target, plan.options.allow_missing)
    return (
        plan if passed == plan.slots else plan_launch(plan.options, plan.config, plan.machine, name_localhost(passed))
    )


def _describe_plan(plan: LaunchPlan) -> str:
    """Return the plan as text: the config, the added environment and the command."""
    variables = "\n".join(f"{name}={shlex.quote(value)}" for name, value in plan.added_environment.items())
    local = local_command(plan.options, plan.slots, plan.machine) if plan.local else None
    argv = (local or plan.command(Layout(plan.slots))).argv
    config = dump_config(plan.config)
    return f"# config\n{config}\n# added to the environment\n{variables}\n\n# command\n{shlex.join(argv)}"


def run_launch(launch: LaunchSettings, summary: str) -> None:
    """Let the ranks begin and wait until they have exited. Raises StoppedError and SystemExit as `launch_pretraining`.
    `summary`: of the run, to print."""
    folder = open_run_folder(launch.folder.path)
    before = completed_saves(folder.checkpoints) or set()
    inform(summary)
    result = supervise(launch)
    match result.outcome:
        case Outcome.DONE:
            with contextlib.suppress(OSError):  # a disk error does not change the outcome
                announce_done(folder, before, time.time() - launch.checked_at)
        case Outcome.STOPPED:
            with contextlib.suppress(OSError):
                announce_stop(folder, before)
            raise StoppedError(result.message)
        case Outcome.REFUSED:
            sys.exit(result.outcome.exit_code)  # rank 0 has printed the message
        case Outcome.FAILED:
            with contextlib.suppress(OSError):
                announce_failure(folder)
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
