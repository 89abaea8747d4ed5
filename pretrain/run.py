"""Entry point of pretraining, started once per device: parse, connect, resolve, build, train, exit.

`deepcloze pretrain` starts it; so does DeepSpeed's launcher:

    deepspeed --num_gpus 2 pretrain/run.py --config FILE [--section.key=value …]
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import datetime
import itertools
import logging
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from experiment.errors import UserError
from experiment.run_folder import Outcome, open_run_folder
from experiment.tracking.rank_logs import set_up_logging
from pretrain.arguments import read_arguments
from pretrain.batching.loader import raise_limit_of_open_files
from pretrain.config import PretrainConfig
from pretrain.corpus.verification import verify_corpora
from pretrain.deadline import deadline
from pretrain.engine.deepspeed_settings import check_device_support
from pretrain.engine.engine import Engine
from pretrain.engine.loss_scaler import LossScaleError
from pretrain.engine.process_group import connect, disconnect
from pretrain.modeling.build import BuiltModel, build_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.rank_outcome import RankReport, rank_report
from pretrain.resolve import ResolvedRun, resolve
from pretrain.training.checkpoint_tensors import UnwritableError
from pretrain.training.health import HEALTH_LIMITS, HealthLimits, UnhealthyError
from pretrain.training.host_group import AgreedError, HostGroup
from pretrain.training.stop_request import StopRequest, exit_on_signal
from pretrain.training.trainer import Trainer
from pretrain.training_stream import TrainingStream, open_stream
from pretrain.world import World

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    world: World,
    stop_request: Callable[[Path | None], StopRequest] = StopRequest,
    limits: HealthLimits = HEALTH_LIMITS,
) -> Outcome:
    """Run or resume a pretraining on this rank. The process group is connected. Raises UserError."""
    report = rank_report(config, world.rank)
    with deadline(_timeout(config), partial(_give_up, report, "the ranks did not connect to each other's hosts")):
        hosts = HostGroup(_timeout(config))
    try:
        return _pretrain(config, world, hosts, stop_request, limits)
    except AgreedError as error:
        report.refuse(error)
        hosts.barrier()  # the launcher kills all ranks when one exits, perhaps before rank 0 has printed
        raise


def _pretrain(
    config: PretrainConfig,
    world: World,
    hosts: HostGroup,
    stop_request: Callable[[Path | None], StopRequest],
    limits: HealthLimits,
) -> Outcome:
    run, model, stream = _prepare(config, world, hosts)
    with contextlib.ExitStack() as resources:
        engine = Engine(
            MaskedLanguageModel(model.model, model.packed),
            run.deepspeed,
            run.config.optimizer,
            run.config.model,
            seed=run.config.run.seed,
            world=world,
            swap_folder=run.deepspeed.swap_folder(run.folder.path),
        )
        resources.callback(engine.close)
        trainer = Trainer(run, model, engine, stream, hosts, limits)
        # Not earlier: a signal to a rank that has not loaded its checkpoint should end it at once.
        stop = resources.enter_context(stop_request(run.folder.stop if world.rank == 0 else None))
        outcome = Outcome.FAILED
        try:
            outcome = trainer.train(stop)
        except UnwritableError as error:
            log.error("no checkpoint can be written: %s", error)
            outcome = Outcome.STOPPED
        except (LossScaleError, UnhealthyError) as error:
            log.error("%s", error)
            hosts.barrier()  # the launcher kills all ranks when one exits, perhaps before rank 0 has printed
            raise
        finally:
            trainer.close(outcome)
        hosts.barrier()
    return outcome


def _prepare(config: PretrainConfig, world: World, hosts: HostGroup) -> tuple[ResolvedRun, BuiltModel, TrainingStream]:
    """Everything that may be refused. A UserError on any rank, such as a host that lacks the corpus, is raised on all.

    Raises AgreedError.
    """
    hosts.call(lambda: set_up_logging(open_run_folder(config.run.dir), world.rank))
    run = hosts.call(lambda: resolve(config, world.size, decide=hosts.from_rank0))
    hosts.call(lambda: check_device_support(run.deepspeed))
    _verify_corpora(run, world, hosts)
    model = hosts.call(lambda: build_model(run.config.model, run.model_config, run.config.run.seed))
    stream = hosts.call(
        lambda: open_stream(run, world, packed=model.packed, first_position=model.first_position),
    )
    return run, model, stream


def _verify_corpora(run: ResolvedRun, world: World, hosts: HostGroup) -> None:
    """Verify the corpora on one rank of each host. The ranks meet after every shard: reading all of them may take
    longer than the timeout of a collective."""
    corpora = [*(given.corpus for given in run.corpora), *run.held_out.values()]
    shards = verify_corpora(corpora if world.local_rank == 0 else [], show_progress=world.rank == 0)

    def verify_next() -> int:
        return sum(1 for _ in itertools.islice(shards, 1))

    while hosts.all_reduce_sum([hosts.call(verify_next)]) != [0]:
        pass


def main(argv: Sequence[str]) -> None:
    """Run this rank and end the process with the outcome's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    raise_limit_of_open_files()
    try:
        config = read_arguments(argv)
    except UserError as error:
        _print_mistake(error, rank)
        _exit(Outcome.REFUSED)
    report = rank_report(config, rank)
    report.start()
    with exit_on_signal(partial(_stop_before_training, report)):
        outcome, message = _run(config, report)
        if outcome in (Outcome.FAILED, Outcome.REFUSED):
            report.fail(outcome, message)
        report.end(outcome.exit_code)
        _exit(outcome)


def _run(config: PretrainConfig, report: RankReport) -> tuple[Outcome, str]:
    """Connect and train. Returns the outcome on this rank, and the reason for a failure."""
    outcome = Outcome.FAILED
    try:
        outcome = pretrain(config, connect(_timeout(config), partial(_give_up, report)))
        report.agree(outcome)
        disconnect()
    except AgreedError as error:
        return Outcome.REFUSED, str(error)  # rank 0 has printed it
    except UserError as error:
        _print_mistake(error, report.rank)
        return Outcome.REFUSED, str(error)
    except (LossScaleError, UnhealthyError) as error:
        return outcome, str(error).partition("\n")[0]  # the rest has been logged
    except BaseException as error:
        log.exception("this rank failed")
        return outcome, f"{platform.node()}, rank {report.rank}: {type(error).__name__}: {error}"
    return outcome, ""


def _stop_before_training(report: RankReport, signal_name: str) -> None:
    _end_early(report, Outcome.STOPPED, f"{signal_name} before the first step; run the same command again")


def _give_up(report: RankReport, message: str) -> None:
    _end_early(report, Outcome.FAILED, message)


def _end_early(report: RankReport, outcome: Outcome, message: str) -> NoReturn:
    """End the process in a thread, while the main thread may be blocked."""
    message = f"{platform.node()}, rank {report.rank}: {message}"
    report.fail(outcome, message)
    report.end(outcome.exit_code)
    print(f"deepcloze: {message}", file=sys.stderr, flush=True)
    os._exit(outcome.exit_code)


def _print_mistake(error: UserError, rank: int) -> None:
    if rank == 0:
        print(f"deepcloze: {error}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
        print(f"deepcloze: {platform.node()}, rank {rank}: {error}", file=sys.stderr)


def _exit(outcome: Outcome) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)  # a normal exit with live collective threads sometimes aborts


def _timeout(config: PretrainConfig) -> datetime.timedelta:
    return datetime.timedelta(seconds=config.health.hang_seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
