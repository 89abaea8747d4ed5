"""Prepare a run on all ranks: everything that may be refused, before the engine takes the device."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from experiment.run_folder import open_run_folder
from experiment.tracking.rank_logs import set_up_logging
from pretrain.batching.packing import Rows
from pretrain.config import PretrainConfig
from pretrain.corpus.reader import Corpus
from pretrain.corpus.verification import verified_shards
from pretrain.engine.deepspeed_settings import check_device_support, warn_of_emulation
from pretrain.modeling.build import BuiltModel, attention_ratio, build_model, choose_rows
from pretrain.plan.memory import weight_dtype
from pretrain.resolve import ResolvedRun, resolve
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import CpuGroup
from pretrain.training_stream import TrainingStream, open_stream
from pretrain.world import World


class Preparation(NamedTuple):
    """What training needs, apart from the engine."""

    run: ResolvedRun
    model: BuiltModel
    stream: TrainingStream


def prepare(config: PretrainConfig, world: World, group: CpuGroup) -> Preparation:
    """Resolve the config, verify the corpora, build the model and open the stream of batches. Collective.

    Raises AgreedError: a UserError on any rank, such as a host that lacks the corpus, is raised on all.
    """
    group.call(lambda: set_up_logging(open_run_folder(config.run.dir), world.rank))
    run = group.call(
        lambda: resolve(config, world.size, decide=group.from_rank0, verify=partial(verify_together, group, world))
    )
    group.call(lambda: check_device_support(run.deepspeed))
    if world.rank == 0:
        warn_of_emulation(run.deepspeed)
    verify_on_each_host([*(given.corpus for given in run.corpora), *run.held_out.values()], world, group)
    model = group.call(lambda: build_model(run.model_source, run.model_config, run.config.run.seed))
    rows = agreed_rows(choose_rows(model, weight_dtype(run.deepspeed)), world, group)
    stream = group.call(
        lambda: open_stream(
            run, world, rows=rows, first_position=model.first_position, attention_ratio=attention_ratio(model.flops)
        )
    )
    return Preparation(run, model, stream)


def agreed_rows(rows: Rows, world: World, group: CpuGroup) -> Rows:
    """The rows of all ranks: windows unless every rank, whose GPU may be of another type, can compute flat ones.
    Collective.

    Rows decide which sequences of a batch a rank takes. `rows`: what this rank would choose.
    """
    (flat,) = group.all_reduce_sum([int(rows == "flat")])
    return "windows" if rows == "flat" and flat < world.size else rows


def verify_on_each_host(corpora: Sequence[Corpus], world: World, group: CpuGroup) -> None:
    """Verify the corpora on one rank of each host. Collective; raises AgreedError for a damaged shard.

    The ranks meet after every shard: reading all of them may take longer than the timeout of a collective.
    """
    shards = verified_shards(corpora if world.local_rank == 0 else [], show_progress=world.rank == 0)
    while group.all_reduce_sum([group.call(lambda: next(shards, None) is not None)]) != [0]:
        pass
