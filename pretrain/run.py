"""Entry point of pretraining, started once per device: parse, connect, resolve, build, train, exit.

`deepcloze pretrain` starts it; so does DeepSpeed's launcher:

    deepspeed --num_gpus 2 pretrain/run.py --config FILE [--section.key=value …]
"""

import gc
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a traceback while it imports
    gc.disable()  # imports make a million objects that stay, and collections among them take a second
if not __package__:  # started as a file: import from the repository, not from this folder
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]
if __name__ == "__main__":
    from experiment.errors import UserError
    from experiment.process.fast_imports import import_transformers_without_scipy
    from experiment.process.own_process import hide_gpus
    from experiment.run_files.outcome_file import Outcome

    hide_gpus()
    import_transformers_without_scipy()
    from pretrain.engine.deepspeed_version import check_version  # imports DeepSpeed
    from pretrain.gate import wait_at_gate

    try:
        check_version()  # before the imports of its internals
    except UserError as error:
        wait_at_gate()  # a launcher on this machine prints the same, and ends this process
        print(f"deepcloze: {error}", file=sys.stderr)
        sys.exit(Outcome.REFUSED.exit_code)

import contextlib
import datetime
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import nn

from experiment.config import load_config
from experiment.errors import AgreedFailureError, UserError
from experiment.files import cache_folder
from experiment.process.own_process import has_launcher
from experiment.process.shared_cores import share_cores
from experiment.run_files.goodput import ActivityTimer, attempt_start
from experiment.run_files.outcome_file import Cause, Outcome, ReportedOutcome
from experiment.run_files.run_folder import RunFolder, check_not_moved
from pretrain.batching.loader import DataWorkerError
from pretrain.config import EngineConfig, PretrainConfig
from pretrain.engine.engine import Engine
from pretrain.engine.process_group import connect, deadline, disconnect
from pretrain.gate import wait_at_gate
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.preparation import prepare
from pretrain.rank_heartbeat import RankHeartbeat
from pretrain.rank_process import RankRecorder, exit_refused, give_up, run_rank
from pretrain.training.background_save import UnwritableError
from pretrain.training.cpu_group import AgreedError, CpuGroup
from pretrain.training.stop_request import StopRequest
from pretrain.training.trainer import Trainer
from pretrain.world import World

log = logging.getLogger(__name__)

_PROCESSES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")  # of mpirun, srun


def pretrain(
    config: PretrainConfig, world: World, stop: StopRequest, recorder: RankRecorder, times: ActivityTimer
) -> ReportedOutcome:
    """Pretrain, or resume pretraining, on this rank. The process group is connected. Raises UserError."""
    with deadline(_timeout(config), partial(give_up, recorder, "the ranks did not connect to each other's hosts")):
        group = CpuGroup(world, _timeout(config), times.make_progress)
    try:
        run, model, stream = prepare(config, group)
        module = MaskedLanguageModel(model.model, run.config.batch.max_seq_length)
        compiled: set[type[nn.Module]] = set()
        if _compiles(run.config.engine):
            from pretrain.modeling.compiled_layers import compile_layers  # takes seconds

            compiled = compile_layers(module, cache_folder() / "compiled")
        with contextlib.ExitStack() as resources:
            engine = Engine(
                module,
                run.deepspeed,
                run.config.optimizer,
                run.config.model,
                seed=run.config.run.seed,
                world=world,
                swap_folder=run.deepspeed.swap_folder(run.folder.path),
                unused=model.unused,
                compiled=compiled,
            )
            resources.callback(engine.close)
            trainer = Trainer(run, model, engine, stream, group, times)
            # Not earlier: a signal to a rank that has not loaded its checkpoint should end it at once.
            stop.begin_training(run.folder.stop if world.rank == 0 else None)
            resources.callback(stop.ignore_second)
            recorder.begin_training()
            return _train(trainer, stop, group)
    except AgreedError as error:
        recorder.announce_refusal(error)
        group.barrier()  # the launcher kills all ranks when one exits, perhaps before rank 0 has printed
        raise


def _compiles(engine: EngineConfig) -> bool:
    return torch.cuda.is_available() if engine.compile == "auto" else engine.compile is True


def _train(trainer: Trainer, stop: StopRequest, group: CpuGroup) -> ReportedOutcome:
    ending = ReportedOutcome(Outcome.FAILED, "")
    try:
        outcome = trainer.train(stop)
        if outcome is Outcome.STOPPED:
            message = f"stopped: {group.first_message(stop.reason)}; run the same command again to resume"
            ending = ReportedOutcome(outcome, message, Cause.SIGNAL)
        else:
            ending = ReportedOutcome(outcome, "")
    except UnwritableError as error:
        ending = ReportedOutcome(Outcome.STOPPED, f"no checkpoint can be written: {error}", Cause.AGREED)
        log.error("%s", ending.message)
    except (AgreedFailureError, DataWorkerError) as error:
        log.error("%s", error)
        with contextlib.suppress(UnwritableError):
            trainer.finish_save()
        group.barrier()  # the launcher kills all ranks when one exits, perhaps before rank 0 has logged the error
        raise
    finally:
        trainer.close(ending.outcome)
    stop.ignore_second()
    group.barrier()
    return ending


def main(argv: Sequence[str]) -> NoReturn:
    """Run this rank and end the process with the outcome's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        _check_started_once(os.environ)
        config = read_arguments(argv)
    except UserError as error:
        exit_refused(error, rank)
    # Without our launcher, rank 0 takes the run folder, or is refused; others know that it has when they meet it.
    folder, holds_folder = RunFolder(Path(config.run.dir).absolute()), rank == 0 or has_launcher()
    recorder = RankRecorder(folder, rank, holds_folder)
    run_rank(partial(_connect_and_pretrain, config, recorder), recorder)


def _check_started_once(environ: Mapping[str, str]) -> None:
    """Raise UserError in one of several processes of srun or mpirun without RANK, each of which would train alone."""
    if "RANK" not in environ and (found := [name for name in _PROCESSES if environ.get(name, "1") != "1"]):
        started = f"srun or mpirun has started it several times, {found[0]} is {environ[found[0]]}, but RANK is not set"
        raise UserError(f"pretrain/run.py: {started}; start `deepcloze pretrain` once instead: it starts all ranks")


def read_arguments(argv: Sequence[str]) -> PretrainConfig:
    """Load the config that the arguments name, with overrides. Ignores the --local_rank that DeepSpeed's launcher adds.

    Fire, which dispatches the `deepcloze` commands, would not do: it reads values as Python literals and turns `-` into
    `_` inside config keys. Raises UserError.
    """
    arguments: dict[str, str] = {}
    rest = list(argv)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--"):
            raise UserError(f"unexpected argument '{key}'; write --section.key=value")
        if not equals:
            if not rest:
                raise UserError(f"{key} needs a value: {key}=…")
            value = rest.pop(0)
        arguments[key.removeprefix("--")] = value
    arguments.pop("local_rank", None)  # LOCAL_RANK in the environment is the same
    if "config" not in arguments:
        raise UserError("--config FILE is missing")
    file = arguments.pop("config")
    config = load_config(PretrainConfig, file, arguments)
    check_not_moved(file, arguments, RunFolder(Path(config.run.dir).absolute()))
    return config


def _connect_and_pretrain(config: PretrainConfig, recorder: RankRecorder, stop: StopRequest) -> Outcome:
    share_cores()
    heartbeat = RankHeartbeat(recorder.folder, recorder.rank, config.health.hang_seconds)

    def take_folder() -> None:
        if not recorder.holds_folder:
            recorder.start()
            heartbeat.start()

    if recorder.holds_folder:
        heartbeat.start()
    world = connect(_timeout(config), partial(give_up, recorder), take_folder)
    times = ActivityTimer(attempt_start())
    heartbeat.follow(times)
    ending = pretrain(config, world, stop, recorder, times)
    recorder.record_agreed(ending)
    with contextlib.suppress(RuntimeError):  # the outcome stands
        disconnect()
    return ending.outcome


def _timeout(config: PretrainConfig) -> datetime.timedelta:
    return datetime.timedelta(seconds=config.health.hang_seconds)


if __name__ == "__main__":
    gc.freeze()  # imported objects: garbage collections skip them, such as the ones of DeepSpeed while it starts
    gc.enable()
    wait_at_gate()
    main(sys.argv[1:])
