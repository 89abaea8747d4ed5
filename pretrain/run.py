"""Per-rank entry point of pretraining: parse, build, train, close.

Started once for every device, by `deepcloze pretrain` or directly:

    deepspeed --num_gpus 2 pretrain/run.py --config FILE [--section.key=value …]
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: the first place to import from would be this folder instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from experiment import checkpoints as checkpoint_store
from experiment.config import dump_config, load_config
from experiment.errors import UserError
from experiment.files import write_text
from experiment.meters import peak_flops
from experiment.provenance import ancestors_of, collect_provenance, read_provenance, write_origin, write_provenance
from experiment.run_folder import Outcome, RunFolder, open_run_folder
from experiment.tracking import Tracker, open_trackers
from experiment.tracking.rank_logs import set_up_logging
from pretrain.batching.batch import RankBatch
from pretrain.batching.masking import masking_policy
from pretrain.batching.packing import MicrobatchLayout
from pretrain.config import PretrainConfig, WeightedCorpus
from pretrain.engine.engine import Engine, LossScaleError, connect, disconnect
from pretrain.engine.settings import find_ds_config
from pretrain.evaluate import as_metrics, evaluate, held_out
from pretrain.export import write_hugging_face_folder
from pretrain.modeling.build import BuiltModel, build_model
from pretrain.modeling.flops import flops_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.resolve import Inputs, check_beginning, check_run, resolve_source, run_identity
from pretrain.stream import open_stream
from pretrain.training import bad_batch as quarantine
from pretrain.training import checkpointer as checkpoint
from pretrain.training.health import Fault, UnhealthyError
from pretrain.training.host_group import HostGroup
from pretrain.training.progress import Progress, fork_of, progress_of
from pretrain.training.resume import ResumePlan
from pretrain.training.stop_request import StopRequest
from pretrain.training.trainer import Parts, train
from pretrain.world import World

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, world: World) -> Outcome:
    """Run or continue a pretraining on this rank; the process group is connected. Raises UserError."""
    folder = open_run_folder(config.run.dir)
    set_up_logging(folder, world.rank)
    agreement = HostGroup(_timeout(config))
    config = agreement.of_rank_0(lambda: resolve_source(config))  # a run that goes on has ever newer checkpoints
    inputs = check_run(config, world.size)
    config = absolute_paths(config, inputs)
    with contextlib.ExitStack() as closing:
        beginning = agreement.of_rank_0(lambda: check_beginning(config, inputs))
        progress = _progress_at(beginning)
        agreement.wait()

        built = build_model(config.model, inputs.model_config, config.run.seed)
        flops = flops_model(built.model)
        stream = open_stream(config, inputs, built.packed, built.first_position, world, folder.path / "index")
        module = MaskedLanguageModel(built.model, built.packed)
        engine = Engine(module, config, inputs.ds_config, world)
        closing.callback(engine.close)
        if beginning.checkpoint is not None:
            checkpoint.load(engine, beginning.checkpoint, beginning.moments)

        on_gpu = engine.device.type == "cuda"
        tracker = _open_tracker(config, folder, progress, beginning, stream.steps, world) if world.rank == 0 else None
        # Not before here: a signal to a rank that has nothing to save should end it at once.
        stop = StopRequest(folder.stop if world.rank == 0 else None)
        closing.callback(stop.close)
        outcome = Outcome.FAILED
        try:
            outcome = train(
                Parts(
                    config=config,
                    engine=engine,
                    agreement=agreement,
                    batches=lambda step: stream.load(step, on_gpu),
                    steps=stream.steps,
                    corpora=tuple(given.name for given in inputs.train),
                    evaluate=_evaluation(config, inputs, built, engine, folder),
                    save=_saving(config, inputs, built, engine, folder),
                    saved=None if beginning.fork or beginning.checkpoint is None else progress.step,
                    go_back=_going_back(engine, agreement, folder),
                    set_aside=_setting_aside(inputs, world, folder),
                    stop=stop,
                    tracker=tracker,
                    flops=flops,
                    peak_flops=peak_flops(torch.cuda.get_device_name(engine.device), engine.precision)
                    if on_gpu
                    else None,
                ),
                progress,
            )
        except checkpoint.UnwritableError as error:
            log.error("no checkpoint can be written: %s", error)
            outcome = Outcome.STOPPED
        except (LossScaleError, UnhealthyError) as error:
            log.error("%s", error)
            agreement.wait()  # a rank that ends before rank 0 has spoken takes it along
            raise
        finally:
            if tracker is not None:
                tracker.close(outcome)
        agreement.wait()
    return outcome


def absolute_paths(config: PretrainConfig, inputs: Inputs) -> PretrainConfig:
    """The config with every path written out, so that RUN/config.yaml starts the same run from anywhere."""
    resume = config.run.resume if config.run.parent is None else str(Path(config.run.parent).absolute())
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).absolute()), "resume": resume}),
            "corpus": config.corpus.model_copy(
                update={
                    "train": _absolute_corpora(config.corpus.train, inputs),
                    "eval": {name: str(corpus.path.absolute()) for name, corpus in inputs.evaluation.items()},
                }
            ),
            "model": config.model.model_copy(
                update={
                    key: str(Path(path).absolute())
                    for key in ("init_from", "added_tokens")
                    if (path := getattr(config.model, key)) is not None
                }
            ),
            "engine": config.engine.model_copy(update={"ds_config": str(find_ds_config(config.engine.ds_config))}),
        }
    )


def _absolute_corpora(train: str | tuple[WeightedCorpus, ...], inputs: Inputs) -> str | tuple[WeightedCorpus, ...]:
    paths = [str(given.corpus.path.absolute()) for given in inputs.train]
    if isinstance(train, str):
        return paths[0]
    return tuple(given.model_copy(update={"path": path}) for given, path in zip(train, paths, strict=True))


def _progress_at(beginning: ResumePlan) -> Progress:
    if beginning.checkpoint is None:
        return Progress()
    changes = "".join(f"\n  {line}" for line in beginning.changes)
    log.info("%s %s%s", "forking" if beginning.fork else "continuing from", beginning.checkpoint, changes)
    if not beginning.moments:
        log.warning("the optimizer is another one: its moments begin at nothing")
    progress = progress_of(checkpoint_store.read_state(beginning.checkpoint))
    return fork_of(progress, beginning.same_stream) if beginning.fork else progress


def _evaluation(
    config: PretrainConfig, inputs: Inputs, built: BuiltModel, engine: Engine, folder: RunFolder
) -> Callable[[], dict[str, float | int | None]]:
    # One length for the whole run, whatever its stages: figures along it can then be compared.
    layout = MicrobatchLayout(
        config.batch.max_seq_length, config.batch.microbatch_tokens, built.packed, built.first_position
    )
    corpora = [
        held_out(
            name,
            corpus,
            vocabulary=inputs.vocabulary,
            policy=masking_policy(config.masking),
            seed=config.run.seed,
            layout=layout,
            world=engine.world,
            index_folder=folder.path / "index",
        )
        for name, corpus in inputs.evaluation.items()
    ]
    return lambda: as_metrics(evaluate(corpora, engine.predict, engine.device))


def _saving(
    config: PretrainConfig, inputs: Inputs, built: BuiltModel, engine: Engine, folder: RunFolder
) -> Callable[[Progress], None]:
    who = run_identity(config, inputs)
    record = read_provenance(folder) if engine.world.rank == 0 else None

    def save(progress: Progress) -> None:
        def write_model(weights: dict[str, Tensor], target: Path) -> None:
            own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
            write_hugging_face_folder(own, built.model, inputs.tokenizer, target)
            assert record is not None  # rank 0, which writes models, has written it
            write_origin(target, folder, record, progress.step)

        state = {"progress": asdict(progress), "config": config.model_dump(mode="json"), "identity": who}
        best = progress.standing.best_step
        keep = checkpoint_store.Retention(config.checkpoint.keep_last, config.checkpoint.keep_every, best)
        checkpoint.save(engine, folder.checkpoints, progress.step, state, write_model, keep)

    return save


def _going_back(engine: Engine, agreement: HostGroup, folder: RunFolder) -> Callable[[], Progress]:
    def go_back() -> Progress:
        newest = agreement.of_rank_0(lambda: checkpoint_store.newest_usable(folder.checkpoints))
        assert newest is not None  # the loop has saved one before it goes on from anywhere
        checkpoint.load(engine, newest)
        return progress_of(checkpoint_store.read_state(newest))

    return go_back


def _setting_aside(inputs: Inputs, world: World, folder: RunFolder) -> Callable[[RankBatch, list[float], Fault], Path]:
    corpora = [given.name for given in inputs.train]

    def set_aside(batch: RankBatch, losses: list[float], fault: Fault) -> Path:
        where = folder.bad_batch(fault.step)
        try:
            quarantine.set_aside(where, world, batch, losses, fault, corpora, inputs.tokenizer.decode)
        except OSError as error:
            log.warning("this rank's share of the bad batch cannot be written to %s: %s", where, error)
        return where

    return set_aside


def _open_tracker(
    config: PretrainConfig,
    folder: RunFolder,
    progress: Progress,
    beginning: ResumePlan,
    steps: int | None,
    world: World,
) -> Tracker:
    run_id = write_provenance(folder, collect_provenance(sys.argv, world.size), _ancestors(config, beginning))
    write_text(folder.config, dump_config(config))
    return open_trackers(
        config.tracking,
        folder,
        total_steps=steps,
        resumed_step=-1 if beginning.fork or beginning.checkpoint is None else progress.step,
        run_id=run_id,
        parameters=config.model_dump(mode="json"),
    )


def _ancestors(config: PretrainConfig, beginning: ResumePlan) -> list[dict[str, Any]] | None:
    """Whose weights a run begins with; None for one that goes on."""
    if beginning.checkpoint is not None:
        return ancestors_of(beginning.checkpoint / "hf", "fork") if beginning.fork else None
    return ancestors_of(Path(config.model.init_from), "init_from") if config.model.init_from else []


def main(argv: Sequence[str]) -> None:
    """Start this rank and end the process with the outcome's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    outcome, message = Outcome.FAILED, ""
    config: PretrainConfig | None = None
    try:
        config = _read_arguments(argv)
        outcome = pretrain(config, connect(_timeout(config)))
        disconnect()
    except UserError as error:
        outcome, message = Outcome.REFUSED, str(error)
        if rank == 0:
            print(f"deepcloze: {message}", file=sys.stderr)
    except (LossScaleError, UnhealthyError) as error:
        message = str(error).partition("\n")[0]  # the whole has been logged
    except BaseException as error:
        message = f"rank {rank}: {type(error).__name__}: {error}"
        log.exception("this rank failed")
    if config is not None:
        _record(RunFolder(Path(config.run.dir).absolute()), outcome, message, rank)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)  # a normal exit of a rank with live collective threads has been seen to abort


def _timeout(config: PretrainConfig) -> datetime.timedelta:
    return datetime.timedelta(seconds=config.health.hang_seconds)


def _read_arguments(argv: Sequence[str]) -> PretrainConfig:
    """--config FILE, what DeepSpeed's launcher adds (--local_rank), and config keys. Raises UserError."""
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
    arguments.pop("local_rank", None)  # the environment says the same
    if "config" not in arguments:
        raise UserError("--config FILE is missing")
    return load_config(PretrainConfig, arguments.pop("config"), arguments)


def _record(folder: RunFolder, outcome: Outcome, message: str, rank: int) -> None:
    """Leave the outcome for the launcher: rank 0's word, or that of a rank that failed where rank 0 said nothing."""
    with contextlib.suppress(OSError):
        if rank == 0 or (outcome == Outcome.FAILED and folder.read_outcome() is None):
            folder.write_outcome(outcome, message)


if __name__ == "__main__":
    main(sys.argv[1:])
