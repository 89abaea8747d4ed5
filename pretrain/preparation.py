"""Prepare a run on all ranks: everything that may be refused, before the engine takes the device."""

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from experiment.checkpoints import complete_checkpoints
from experiment.errors import UserError
from experiment.hub_names import HubName
from experiment.mirror import Mirror
from experiment.model_names import local_model
from experiment.run_folder import RunFolder, open_run_folder
from experiment.storage import StorageError
from experiment.tracking.rank_logs import set_up_logging
from pretrain.batching.packing import Rows
from pretrain.config import CorpusConfig, PretrainConfig
from pretrain.corpus.cache import CorpusCache
from pretrain.corpus.reader import Corpus
from pretrain.corpus.verification import verified_shards
from pretrain.engine.deepspeed_settings import check_device_support, warn_of_emulation
from pretrain.modeling.build import BuiltModel, attention_ratio, build_model, choose_rows
from pretrain.modeling.output_bias import set_output_bias, token_frequencies
from pretrain.plan.memory import weight_dtype
from pretrain.resolve import ResolvedRun, resolve
from pretrain.resume import is_fork_of
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import CpuGroup
from pretrain.training_stream import TrainingStream, open_stream
from pretrain.world import World

log = logging.getLogger(__name__)

_OWNER_SECONDS = 60.0  # for the storage to say to which run a mirror belongs


def prepare(config: PretrainConfig, world: World, group: CpuGroup) -> tuple[ResolvedRun, BuiltModel, TrainingStream]:
    """Resolve the config, verify the corpora, build the model and open the stream of batches. Collective.

    Raises AgreedError: a UserError on any rank, such as a host that lacks the corpus, is raised on all.
    """
    group.call(lambda: set_up_logging(open_run_folder(config.run.dir), world.rank))
    restore_from_mirror(config, world, group)
    run = group.call(
        lambda: resolve(
            config,
            world.size,
            decide=group.from_rank0,
            verify=partial(verify_together, group, world),
            find_model=partial(download_model_to_hosts, world, group),
            copy_corpora=partial(copy_corpora_to_hosts, world, group),
        )
    )
    group.call(lambda: check_device_support(run.deepspeed))
    if world.rank == 0:
        warn_of_emulation(run.deepspeed)
    verify_on_each_host([*(given.corpus for given in run.corpora), *run.held_out.values()], world, group)
    model = group.call(lambda: _build_model(run))
    rows = agreed_rows(choose_rows(model, weight_dtype(run.deepspeed)), world, group)
    stream = group.call(
        lambda: open_stream(
            run, world, rows=rows, first_position=model.first_position, attention_ratio=attention_ratio(model.flops)
        )
    )
    return run, model, stream


def _build_model(run: ResolvedRun) -> BuiltModel:
    """Return the model of the run; its weights are still to be loaded if the run resumes."""
    model = build_model(run.model_source, run.model_config, run.config.run.seed)
    if run.config.model.output_bias == "log_frequency" and run.resume_plan.checkpoint is None:
        frequencies = token_frequencies([each.corpus for each in run.corpora], [each.weight for each in run.corpora])
        set_output_bias(model.model, frequencies)
    return model


def agreed_rows(rows: Rows, world: World, group: CpuGroup) -> Rows:
    """Return the rows of all ranks: windows unless every rank, whose GPU may be of another type, can compute flat ones.
    Collective.

    Rows decide which sequences of a batch a rank takes. `rows`: the choice of this rank alone.
    """
    (flat,) = group.all_reduce_sum([int(rows == "flat")])
    return "windows" if rows == "flat" and flat < world.size else rows


def copy_corpora_to_hosts(world: World, group: CpuGroup, config: CorpusConfig) -> Mapping[str, Path]:
    """Copy the corpora to `corpus.cache` on one rank of each host. Collective; raises AgreedError.

    Returns the folder of each corpus, as `CorpusCache.locate` does on the host; nothing without a cache.
    """
    if config.cache is None:
        return {}
    folder = Path(config.cache)

    def locate(on_progress: Callable[[], None]) -> tuple[str, dict[str, Path] | None]:
        cache = CorpusCache(folder, config.cache_bytes, on_progress, show_progress=world.rank == 0)
        return platform.node(), cache.locate(config.sources) if world.local_rank == 0 else None

    # The rank with local rank 0 need not be the first one of its host: hosts may have different numbers of ranks.
    located = group.from_all_ranks_slowly(locate)
    return next(copies for host, copies in located if host == platform.node() and copies is not None)


def download_model_to_hosts(world: World, group: CpuGroup, name: str) -> Path:
    """Like `local_model`; one rank of each host downloads a model of the Hub. Collective; raises AgreedError.

    name: absolute if it is a path.
    """

    def download(on_progress: Callable[[], None]) -> None:
        if world.local_rank == 0:
            local_model(name, on_progress)

    if HubName.parse(name) is not None:
        group.from_all_ranks_slowly(download)
    return local_model(name)


def restore_from_mirror(config: PretrainConfig, world: World, group: CpuGroup) -> None:
    """Copy the run in `checkpoint.mirror` to a run folder without checkpoints. Collective; raises AgreedError, also if
    the mirror belongs to another run than the folder."""
    folder, url = RunFolder(Path(config.run.dir).absolute()), config.checkpoint.mirror
    if url is None:
        return

    def restore(on_progress: Callable[[], None]) -> None:
        if world.rank != 0:
            return
        mirror = Mirror(url)
        if complete_checkpoints(folder.checkpoints):
            _check_owner_in_time(mirror, folder)
            return
        if folder.provenance.exists():  # else the folder takes over the mirror's run
            mirror.check_owner(folder)
        parent, found = config.run.parent, mirror.provenance()
        if config.run.resume == "never" and (found is not None or mirror.complete()):
            raise UserError(f"run.resume is 'never', but {url} already holds a run; choose another checkpoint.mirror")
        if parent is not None and found is not None and not is_fork_of(found["ancestors"], parent):
            raise UserError(f"{url} holds a run that is not a fork of {parent}; choose another checkpoint.mirror")
        mirror.restore(folder, on_progress)

    group.from_all_ranks_slowly(restore)


def _check_owner_in_time(mirror: Mirror, folder: RunFolder) -> None:
    """Raise UserError if the mirror belongs to another run. A storage that does not answer only gives a warning: a run
    with checkpoints trains without it, and is checked again before each upload."""
    thread = ThreadPoolExecutor(1, "owner of the mirror")
    checking = thread.submit(mirror.check_owner, folder)
    thread.shutdown(wait=False)
    try:
        checking.result(_OWNER_SECONDS)
    except (StorageError, TimeoutError) as error:
        problem = str(error) or f"no answer in {_OWNER_SECONDS:.0f} s"
        log.warning("not checked whether the mirror %s belongs to this run: %s", mirror.url, problem)


def verify_on_each_host(corpora: Sequence[Corpus], world: World, group: CpuGroup) -> None:
    """Verify the corpora on one rank of each host. Collective; raises AgreedError for a damaged shard.

    The ranks meet after every shard: reading all of them may take longer than the timeout of a collective.
    """
    shards = verified_shards(corpora if world.local_rank == 0 else [], show_progress=world.rank == 0)
    while group.all_reduce_sum([group.call(lambda: next(shards, None) is not None)]) != [0]:
        pass
