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
import logging
import os
import platform
from collections.abc import Callable, Sequence

from experiment.errors import UserError
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from experiment.tracking.rank_logs import set_up_logging
from pretrain.arguments import read_arguments
from pretrain.batching.loader import DataWorkerError, raise_limit_of_open_files
from pretrain.config import PretrainConfig
from pretrain.engine.engine import Engine
from pretrain.engine.loss_scaler import LossScaleError
from pretrain.engine.process_group import connect, disconnect
from pretrain.modeling.build import BuiltModel, build_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.rank_outcome import record_outcome, report_refusal
from pretrain.resolve import ResolvedRun, resolve
from pretrain.training.checkpoint_tensors import UnwritableError
from pretrain.training.health import HEALTH_LIMITS, HealthLimits, UnhealthyError
from pretrain.training.host_group import AgreedError, HostGroup
from pretrain.training.stop_request import StopRequest
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
    hosts = HostGroup(_timeout(config))
    try:
        run, model, stream = _prepare(config, world, hosts)
    except AgreedError as error:
        report_refusal(config, error, world.rank)
        hosts.barrier()  # the launcher kills all ranks when one exits, perhaps before rank 0 has printed
        raise
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
    set_up_logging(hosts.call(lambda: open_run_folder(config.run.dir)), world.rank)
    run = hosts.call(lambda: resolve(config, world.size, decide=hosts.from_rank0))
    model = hosts.call(lambda: build_model(run.model_source, run.model_config, run.config.run.seed))
    stream = hosts.call(
        lambda: open_stream(run, world, packed=model.packed, first_position=model.first_position),
    )
    return run, model, stream


def main(argv: Sequence[str]) -> None:
    """Run this rank and end the process with the outcome's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    raise_limit_of_open_files()
    outcome, message = Outcome.FAILED, ""
    config: PretrainConfig | None = None
    try:
        config = read_arguments(argv)
        outcome = pretrain(config, connect(_timeout(config)))
        disconnect()
    except AgreedError as error:
        outcome, message = Outcome.REFUSED, str(error)  # rank 0 has printed it
    except UserError as error:
        outcome, message = Outcome.REFUSED, str(error)
        if rank == 0:
            print(f"deepcloze: {message}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
            print(f"deepcloze: {platform.node()}, rank {rank}: {message}", file=sys.stderr)
    except (LossScaleError, UnhealthyError) as error:
        message = str(error).partition("\n")[0]  # the rest has been logged
    except DataWorkerError as error:
        log.error("%s", error)
        message = f"rank {rank}: {error}".partition("\n")[0]
    except BaseException as error:
        message = f"rank {rank}: {type(error).__name__}: {error}"
        log.exception("this rank failed")
    if config is not None:
        record_outcome(RunFolder(Path(config.run.dir).absolute()), outcome, message, rank)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)  # a normal exit with live collective threads sometimes aborts


def _timeout(config: PretrainConfig) -> datetime.timedelta:
    return datetime.timedelta(seconds=config.health.hang_seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
