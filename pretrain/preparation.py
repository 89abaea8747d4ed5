"""Prepare a run on all ranks: everything that may be refused, before the engine takes the device."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from experiment.checkpoints import complete_checkpoints, verify_descriptions
from experiment.errors import UserError
from experiment.hub_names import HubName
from experiment.mirror import Mirror
from experiment.model_names import local_model
from experiment.run_folder import RunFolder, open_run_folder
from experiment.storage import is_url
from experiment.tracking.rank_logs import set_up_logging
from pretrain.batching.packing import Rows
from pretrain.config import CorpusConfig, PretrainConfig
from pretrain.corpus.cache import CorpusCache
from pretrain.corpus.reader import Corpus
from pretrain.corpus.verification import verified_shards
from pretrain.engine.deepspeed_settings import check_device_support, warn_of_emulation
from pretrain.modeling.build import BuiltModel, attention_ratio, build_model, choose_rows
from pretrain.plan.memory import weight_dtype
from pretrain.resolve import ResolvedRun, resolve
from pretrain.resume import find_resume_candidates, locate_model
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import CpuGroup
from pretrain.training_stream import TrainingStream, open_stream
from pretrain.world import World

T = TypeVar("T")


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
    restore_from_mirror(config, world, group)
    copies = copy_corpora_to_hosts(config.corpus, world, group)
    download_model_to_hosts(config, world, group)
    verify = partial(verify_together, group, world)
    run = group.call(lambda: resolve(config, world.size, group.from_rank0, verify, copies))
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


def copy_corpora_to_hosts(config: CorpusConfig, world: World, group: CpuGroup) -> dict[str, Path]:
    """Copy the corpora to `corpus.cache` on one rank of each host. Collective; raises AgreedError.

    Returns the folder of each corpus, as `CorpusCache.locate` does on the host; nothing without a cache.
    """
    if config.cache is None:
        return {}
    sources = [name if is_url(name) else str(Path(name).absolute()) for name in config.sources]
    folder = Path(config.cache).absolute()

    def locate(on_progress: Callable[[], None]) -> dict[str, Path]:
        cache = CorpusCache(folder, config.cache_bytes, on_progress, show_progress=world.rank == 0)
        return cache.locate(sources) if world.local_rank == 0 else {}

    return _call_slow(locate, group)[world.rank - world.local_rank]


def download_model_to_hosts(config: PretrainConfig, world: World, group: CpuGroup) -> None:
    """Download the model that `model.init_from` names on one rank of each host, if it is one of the Hub and the run
    does not resume with the copy in its checkpoint. Collective; raises AgreedError."""

    def find() -> str:
        if config.model.init_from is None or HubName.of_model(config.model.init_from) is None:
            return ""
        folder = RunFolder(Path(config.run.dir).absolute())
        point = find_resume_candidates(config.run, folder).choose(verify_descriptions)
        return locate_model(config.model, point)[1].init_from or ""

    name = group.call(lambda: group.from_rank0(find))

    def download(on_progress: Callable[[], None]) -> None:
        if world.local_rank == 0:
            local_model(name, on_progress)

    if HubName.parse(name) is not None:  # not a path, which is absolute
        _call_slow(download, group)


def restore_from_mirror(config: PretrainConfig, world: World, group: CpuGroup) -> None:
    """Copy the newest checkpoint of `checkpoint.mirror` to a run folder without checkpoints. Collective; raises
    AgreedError."""
    folder, url = RunFolder(Path(config.run.dir).absolute()), config.checkpoint.mirror
    if url is None:
        return

    def restore(on_progress: Callable[[], None]) -> None:
        if world.rank != 0 or complete_checkpoints(folder.checkpoints):
            return
        mirror = Mirror(url)
        if config.run.resume == "never" and mirror.complete():
            raise UserError(
                f"run.resume is 'never', but {url} already holds checkpoints; choose another checkpoint.mirror"
            )
        mirror.restore(folder, on_progress, show_progress=True)

    _call_slow(restore, group)


def _call_slow(function: Callable[[Callable[[], None]], T], group: CpuGroup) -> list[T]:
    """Call a function on all ranks that may take longer than the timeout of a collective. Collective; raises
    AgreedError. `function` gets what it must call when it makes progress. Returns the results by rank."""
    progressed = threading.Event()
    thread = ThreadPoolExecutor(1, "preparation")
    part = thread.submit(function, progressed.set)
    thread.shutdown(wait=False)

    def made_progress() -> bool:
        made = progressed.is_set()
        progressed.clear()
        return made

    group.wait_for_all(part, made_progress)
    return group.from_all_ranks(part.result)


def verify_on_each_host(corpora: Sequence[Corpus], world: World, group: CpuGroup) -> None:
    """Verify the corpora on one rank of each host. Collective; raises AgreedError for a damaged shard.

    The ranks meet after every shard: reading all of them may take longer than the timeout of a collective.
    """
    shards = verified_shards(corpora if world.local_rank == 0 else [], show_progress=world.rank == 0)
    while group.all_reduce_sum([group.call(lambda: next(shards, None) is not None)]) != [0]:
        pass
