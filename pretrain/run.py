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
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that torch finds no GPU either; read at its first look for one
if not __package__:  # started as a file: import from the repository, not from this folder
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]

import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import nn

from experiment.errors import AgreedFailureError, UserError
from experiment.files import cache_folder
from experiment.goodput import ActivityTimer, attempt_start
from experiment.outcome_file import Cause, Outcome, ReportedOutcome
from pretrain.arguments import read_arguments
from pretrain.batching.loader import DataWorkerError
from pretrain.config import EngineConfig, PretrainConfig
from pretrain.deadline import deadline
from pretrain.engine.engine import Engine
from pretrain.engine.process_group import connect, disconnect
from pretrain.modeling.compile_time import compile_seconds
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.preparation import prepare
from pretrain.rank_heartbeat import RankHeartbeat
from pretrain.rank_process import exit_refused, give_up, run_rank, stop_at_once, wait_at_gate
from pretrain.rank_report import RankReport, rank_report
from pretrain.training.background_save import UnwritableError
from pretrain.training.cpu_group import AgreedError, CpuGroup
from pretrain.training.health import HEALTH_LIMITS, HealthLimits
from pretrain.training.stop_request import StopRequest
from pretrain.training.trainer import Trainer
from pretrain.world import World

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    world: World,
    stop_request: Callable[[Path | None], StopRequest] = StopRequest,
    limits: HealthLimits = HEALTH_LIMITS,
    report: RankReport | None = None,
    times: ActivityTimer | None = None,
) -> ReportedOutcome:
    """Run or resume a pretraining on this rank. The process group is connected. Raises UserError.

    times: of this attempt; default: it starts now.
    """
    times = times or ActivityTimer(time.time(), compile_seconds)
    report = report or rank_report(config, world.rank)
    with deadline(_timeout(config), partial(give_up, report, "the ranks did not connect to each other's hosts")):
        group = CpuGroup(_timeout(config), times.make_progress)
    try:
        run, model, stream = prepare(config, world, group)
        module = MaskedLanguageModel(model.model, model.packed, run.longest_sequence)
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
                compiled=compiled,
            )
            resources.callback(engine.close)
            trainer = Trainer(run, model, engine, stream, group, times, limits)
            # Not earlier: a signal to a rank that has not loaded its checkpoint should end it at once.
            stop = resources.enter_context(stop_request(run.folder.stop if world.rank == 0 else None))
            report.begin_training()
            return _train(trainer, stop, group)
    except AgreedError as error:
        report.announce_refusal(error)
        group.barrier()  # the launcher kills all ranks when one exits, perhaps before rank 0 has printed
        raise


def _compiles(engine: EngineConfig) -> bool:
    return torch.cuda.is_available() if engine.compile == "auto" else engine.compile


def _train(trainer: Trainer, stop: StopRequest, group: CpuGroup) -> ReportedOutcome:
    ending = ReportedOutcome(Outcome.FAILED, "")
    try:
        ending = _reported(trainer.train(stop), stop, group)
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


def _reported(outcome: Outcome, stop: StopRequest, group: CpuGroup) -> ReportedOutcome:
    """The outcome and, if a rank was asked to stop, which one and how. Collective."""
    if outcome is not Outcome.STOPPED:
        return ReportedOutcome(outcome, "")
    message = f"stopped: {group.first_message(stop.reason)}; run the same command again to resume"
    return ReportedOutcome(outcome, message, Cause.SIGNAL)


def main(argv: Sequence[str]) -> NoReturn:
    """Run this rank and end the process with the outcome's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = read_arguments(argv)
    except UserError as error:
        exit_refused(error, rank)
    report = rank_report(config, rank)
    run_rank(partial(_connect_and_pretrain, config, report), report)


def _connect_and_pretrain(config: PretrainConfig, report: RankReport) -> Outcome:
    heartbeat = RankHeartbeat(report.folder, report.rank, config.health.hang_seconds)
    heartbeat.start()
    world = connect(_timeout(config), partial(give_up, report))
    stop_request = partial(StopRequest, end_process=partial(stop_at_once, report))
    times = ActivityTimer(attempt_start(), compile_seconds)
    heartbeat.follow(times)
    ending = pretrain(config, world, stop_request, report=report, times=times)
    report.agree(ending)
    with contextlib.suppress(RuntimeError):  # the outcome stands
        disconnect()
    return ending.outcome


def _timeout(config: PretrainConfig) -> datetime.timedelta:
    return datetime.timedelta(seconds=config.health.hang_seconds)


if __name__ == "__main__":
    gc.freeze()  # what is imported: collections skip it, such as those that DeepSpeed makes while it starts
    gc.enable()
    wait_at_gate()
    main(sys.argv[1:])
