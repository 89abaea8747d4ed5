"""Per-rank entry point of pretraining: parse, build, train, close.

Started once for every device, by `deepcloze pretrain` or directly:

    deepspeed --num_gpus 2 pretrain/run.py --config FILE [--section.key=value …]
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: the first place to import from would be this folder instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from experiment.configuration import dump_config, load_config
from experiment.errors import UserError
from experiment.folder import Outcome, RunFolder, open_run_folder, write_text
from experiment.meters import peak_flops
from experiment.provenance import collect_provenance, write_provenance
from experiment.tracking import Tracker, open_trackers
from experiment.tracking.rank_logs import set_up_logging
from pretrain.batching.loader import BatchMaker, Layout, World, load
from pretrain.batching.masking import Masker, MaskingPolicy
from pretrain.batching.order import ShuffledOrder
from pretrain.batching.sequences import open_index
from pretrain.check import Inputs, check_run
from pretrain.config import PretrainConfig
from pretrain.evaluate import as_metrics, evaluate, held_out
from pretrain.export import write_hugging_face_folder
from pretrain.modeling.build import BuiltModel, build_model
from pretrain.modeling.flops import flops_model
from pretrain.modeling.masked_lm import MaskedLanguageModel
from pretrain.training import checkpoint, checkpoint_store
from pretrain.training.agreement import Agreement
from pretrain.training.ds_config import find_ds_config
from pretrain.training.engine import Engine, connect, disconnect
from pretrain.training.loop import Parts, Progress, progress_of, train
from pretrain.training.resume import check_resume, identity
from pretrain.training.stopping import StopWish

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, world: World) -> Outcome:
    """Run or continue a pretraining on this rank; the process group is connected. Raises UserError."""
    folder = open_run_folder(config.run.dir)
    set_up_logging(folder, world.rank)
    inputs = check_run(config, world.size)
    config = absolute_paths(config, inputs)
    agreement = Agreement()
    with contextlib.ExitStack() as closing:
        resumed = agreement.of_rank_0(lambda: _find_checkpoint(config, folder))
        progress = Progress()
        who = identity(config.model_dump(mode="json"), inputs.model_config.to_dict(), inputs.train.fingerprint)
        if resumed is not None:
            state = checkpoint_store.read_state(resumed)
            differences = check_resume(state["identity"], who, str(resumed))
            progress = progress_of(state)
            log.info("continuing from %s%s", resumed, "".join(f"\n  {line}" for line in differences))
        agreement.wait()

        built = build_model(config.model, inputs.model_config, config.run.seed)
        flops = flops_model(built.model)
        module = MaskedLanguageModel(built.model, built.packed)
        engine = Engine(module, config, inputs.ds_config, world)
        closing.callback(engine.close)
        if resumed is not None:
            checkpoint.load(engine, resumed)

        layout = Layout(config.batch.max_seq_length, config.batch.microbatch_tokens, built.packed, built.first_position)
        maker, steps = _training_batches(config, inputs, layout, world, folder)
        on_gpu = engine.device.type == "cuda"
        tracker = (
            _open_tracker(config, folder, progress, resumed is not None, steps, world) if world.rank == 0 else None
        )
        # Not before here: a signal to a rank that has nothing to save should end it at once.
        stop = StopWish(folder.stop if world.rank == 0 else None)
        closing.callback(stop.close)
        outcome = Outcome.FAILED
        try:
            outcome = train(
                Parts(
                    config=config,
                    engine=engine,
                    agreement=agreement,
                    batches=load(maker, progress.step, steps, workers=2 if on_gpu else 1, pin_memory=on_gpu),
                    steps=steps,
                    evaluate=_evaluation(config, inputs, layout, engine, folder),
                    save=_saving(config, inputs, built, engine, folder, who),
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
        finally:
            if tracker is not None:
                tracker.close(outcome)
        agreement.wait()
    return outcome


def absolute_paths(config: PretrainConfig, inputs: Inputs) -> PretrainConfig:
    """The config with every path written out, so that RUN/config.yaml starts the same run from anywhere."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).absolute())}),
            "corpus": config.corpus.model_copy(
                update={
                    "train": str(inputs.train.path.absolute()),
                    "eval": {name: str(corpus.path.absolute()) for name, corpus in inputs.evaluation.items()},
                }
            ),
            "model": config.model.model_copy(
                update={"init_from": config.model.init_from and str(Path(config.model.init_from).absolute())}
            ),
            "engine": config.engine.model_copy(update={"ds_config": str(find_ds_config(config.engine.ds_config))}),
        }
    )


def _find_checkpoint(config: PretrainConfig, folder: RunFolder) -> Path | None:
    """The checkpoint to go on from. Raises UserError where a run must begin but has begun before."""
    if config.run.resume == "never" and (
        folder.metrics.exists() or checkpoint_store.complete_checkpoints(folder.checkpoints)
    ):
        raise UserError(f"run.resume is 'never', but {folder.path} holds a run already; name another run.dir")
    return checkpoint_store.newest_usable(folder.checkpoints)


def _training_batches(
    config: PretrainConfig, inputs: Inputs, layout: Layout, world: World, folder: RunFolder
) -> tuple[BatchMaker, int]:
    """The maker of this rank's batches, and how many steps there are."""
    index = open_index(inputs.train, layout.width - inputs.vocabulary.frame, folder.path / "index")
    order = ShuffledOrder(len(index), config.run.seed, config.batch.sequences, config.schedule.epochs)
    masker = Masker(inputs.vocabulary, _policy(config), config.run.seed, inputs.train.fingerprint)
    maker = BatchMaker(inputs.train, index, order, masker, inputs.vocabulary, layout, world)
    steps = config.schedule.steps or order.steps
    assert steps is not None
    return maker, steps


def _policy(config: PretrainConfig) -> MaskingPolicy:
    return MaskingPolicy(config.masking.rates[-1], config.masking.mask_share, config.masking.random_share)


def _evaluation(
    config: PretrainConfig, inputs: Inputs, layout: Layout, engine: Engine, folder: RunFolder
) -> Callable[[], dict[str, float | int | None]]:
    corpora = [
        held_out(
            name,
            corpus,
            vocabulary=inputs.vocabulary,
            policy=_policy(config),
            seed=config.run.seed,
            layout=layout,
            world=engine.world,
            index_folder=folder.path / "index",
        )
        for name, corpus in inputs.evaluation.items()
    ]
    return lambda: as_metrics(evaluate(corpora, engine.predict, engine.device))


def _saving(
    config: PretrainConfig, inputs: Inputs, built: BuiltModel, engine: Engine, folder: RunFolder, who: dict[str, Any]
) -> Callable[[Progress], None]:
    def write_model(weights: dict[str, Tensor], target: Path) -> None:
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        write_hugging_face_folder(own, built.model, inputs.tokenizer, target)

    def save(progress: Progress) -> None:
        state = {"progress": asdict(progress), "config": config.model_dump(mode="json"), "identity": who}
        keep = checkpoint_store.Retention(config.checkpoint.keep_last, config.checkpoint.keep_every)
        checkpoint.save(engine, folder.checkpoints, progress.step, state, write_model, keep)

    return save


def _open_tracker(
    config: PretrainConfig, folder: RunFolder, progress: Progress, resumed: bool, steps: int, world: World
) -> Tracker:
    run_id = write_provenance(folder, collect_provenance(sys.argv, world.size))
    write_text(folder.config, dump_config(config))
    return open_trackers(
        config.tracking,
        folder,
        total_steps=steps,
        resumed_step=progress.step if resumed else -1,
        run_id=run_id,
        parameters=config.model_dump(mode="json"),
    )


def main(argv: Sequence[str]) -> None:
    """Start this rank and end the process with the outcome's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    outcome, message = Outcome.FAILED, ""
    config: PretrainConfig | None = None
    try:
        config = _read_arguments(argv)
        outcome = pretrain(config, connect())
        disconnect()
    except UserError as error:
        outcome, message = Outcome.REFUSED, str(error)
        if rank == 0:
            print(f"deepcloze: {message}", file=sys.stderr)
    except BaseException as error:
        message = f"rank {rank}: {type(error).__name__}: {error}"
        log.exception("this rank failed")
    if config is not None:
        _record(RunFolder(Path(config.run.dir).absolute()), outcome, message, rank)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)  # a normal exit of a rank with live collective threads has been seen to abort


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
