"""Prepare a run on all ranks: everything that may be refused, before the engine takes the device."""

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from experiment.files import write_json
from experiment.models.hub_names import HubName
from experiment.models.model_names import local_model
from experiment.run_files.checkpoints import complete_checkpoints, read_state
from experiment.run_files.provenance import separate_copy
from experiment.run_files.run_folder import RunFolder, open_run_folder
from experiment.tracking.rank_logs import set_up_logging
from pretrain.batching.packing import RowKind
from pretrain.config import CorpusConfig, PretrainConfig
from pretrain.corpus.cache import CorpusCache
from pretrain.corpus.reader import Corpus
from pretrain.corpus.verification import verified_shards
from pretrain.engine.deepspeed_settings import check_device_support, warn_of_emulation
from pretrain.modeling.build import BuiltModel, build_model, choose_row_kind
from pretrain.modeling.output_bias import set_output_bias, token_frequencies
from pretrain.resolve import ResolvedRun, resolve
from pretrain.restore import repair_checkpoint, restore_run
from pretrain.training.checkpointer import verify_together
from pretrain.training.cpu_group import AgreedError, CpuGroup
from pretrain.training_stream import TrainingStream, open_stream, run_layout

log = logging.getLogger(__name__)


def prepare(config: PretrainConfig, group: CpuGroup) -> tuple[ResolvedRun, BuiltModel, TrainingStream]:
    """Resolve the config, verify the corpora, build the model and open the stream of batches. Collective.

    Raises AgreedError: a UserError on any rank, such as a host that lacks the corpus, is raised on all.
    """
    world = group.world
    group.call(lambda: set_up_logging(open_run_folder(config.run.dir), world.rank))
    group.from_rank0(lambda: _identify_copy(RunFolder(Path(config.run.dir).absolute())))
    restore_from_mirror(group, config)
    verify = partial(verify_or_repair, group, config.checkpoint.mirror)
    find_model = partial(download_model_to_hosts, group)
    copy_corpora = partial(copy_corpora_to_hosts, group)
    run = group.call(lambda: resolve(config, world.size, group.from_rank0, verify, find_model, copy_corpora))
    group.call(lambda: check_device_support(run.deepspeed))
    if world.rank == 0:
        warn_of_emulation(run.deepspeed)
    verify_on_each_host(group, run.all_corpora)
    for corpus in run.all_corpora:  # now: held-out ones may be read hours later
        group.call(corpus.map_shards)
    model = group.call(lambda: _build_model(run))
    kind = agreed_row_kind(group, choose_row_kind(model, run.deepspeed.dtype))
    on_gpu = torch.cuda.is_available()  # where no width has been measured: rows are as wide as the longest sequence
    ratio = None if on_gpu or model.flops is None else model.flops.attention_ratio
    layout = run_layout(run, kind, model.first_position)
    stream = group.call(lambda: open_stream(run, world, layout, ratio))
    return run, model, stream


def _identify_copy(folder: RunFolder) -> None:
    """Give the folder the id in its checkpoints if it has none, and a copy of another folder an id of its own."""
    checkpoints = complete_checkpoints(folder.checkpoints)
    if checkpoints and not folder.provenance.exists():  # they alone were copied here
        with suppress(ValueError, KeyError):  # a damaged one is refused later
            write_json(folder.provenance, read_state(checkpoints[-1])["provenance"])
    if (first := separate_copy(folder)) is not None:
        log.warning("this is a copy of the run in %s: it gets an id of its own", first)


def _build_model(run: ResolvedRun) -> BuiltModel:
    """Return the model of the run; its weights are still to be loaded if the run resumes."""
    model = build_model(run.model_source, run.model_config, run.config.run.seed)
    if run.config.model.output_bias == "log_frequency" and run.resume_plan.checkpoint is None:
        frequencies = token_frequencies([each.corpus for each in run.corpora], [each.weight for each in run.corpora])
        set_output_bias(model.model, frequencies, pretrained=run.model_source.init_from is not None)
    return model


def agreed_row_kind(group: CpuGroup, kind: RowKind) -> RowKind:
    """Return the kind of rows of all ranks: flat only if every rank can compute flat rows; GPUs may differ. Collective.

    It decides which sequences of a batch a rank takes. `kind`: the choice of this rank alone. Raises AgreedError if
    only some can pack sequences: a model is tried with its weights, on each host's CPU.
    """
    flat, padded = group.all_reduce_sum([int(kind == "flat"), int(kind == "padded")])
    if 0 < padded < group.world.size:
        raise AgreedError(
            f"{padded} of {group.world.size} ranks find that packed sequences would get other logits in this model, "
            "the others do not: use hosts with the same CPU"
        )
    return "packed" if kind == "flat" and flat < group.world.size else kind


def copy_corpora_to_hosts(group: CpuGroup, config: CorpusConfig) -> Mapping[str, Path]:
    """Copy the corpora to `corpus.cache` on one rank of each host. Collective; raises AgreedError.

    Returns the folder of each corpus, as `CorpusCache.locate` on the host does; nothing without a cache.
    """
    if config.cache is None:
        return {}
    folder, world = Path(config.cache), group.world

    def locate(on_progress: Callable[[], None]) -> tuple[str, dict[str, Path] | None]:
        cache = CorpusCache(folder, config.cache_bytes, on_progress, show_progress=world.rank == 0)
        copies = {source: cache.locate(source) for source in config.sources} if world.local_rank == 0 else None
        return platform.node(), copies

    # The rank with local rank 0 need not be the first one of its host: hosts may have different numbers of ranks.
    located = group.from_all_ranks_slowly(locate)
    return next(copies for host, copies in located if host == platform.node() and copies is not None)


def download_model_to_hosts(group: CpuGroup, name: str) -> Path:
    """Like `local_model`; one rank of each host downloads a model of the Hub. Collective; raises AgreedError.

    name: absolute if it is a path.
    """

    def download(on_progress: Callable[[], None]) -> None:
        if group.world.local_rank == 0:
            local_model(name, on_progress)

    if HubName.parse(name) is not None:
        group.from_all_ranks_slowly(download)
    return local_model(name)


def restore_from_mirror(group: CpuGroup, config: PretrainConfig) -> None:
    """Like `restore_run`, on rank 0. Collective; raises AgreedError."""
    if config.checkpoint.mirror is not None:
        is_first = group.world.rank == 0
        group.from_all_ranks_slowly(lambda on_progress: restore_run(config, on_progress) if is_first else None)


def verify_or_repair(group: CpuGroup, mirror: str | None, checkpoint: Path) -> str | None:
    """Like `verify_together`, after a damaged checkpoint is replaced by its copy in the mirror. Collective."""
    problem = verify_together(group, checkpoint)
    if problem is None or mirror is None:
        return problem

    def repair(on_progress: Callable[[], None]) -> bool:
        return group.world.rank == 0 and repair_checkpoint(mirror, checkpoint, problem, on_progress)

    return verify_together(group, checkpoint) if any(group.from_all_ranks_slowly(repair)) else problem


def verify_on_each_host(group: CpuGroup, corpora: Sequence[Corpus]) -> None:
    """Verify the corpora on one rank of each host. Collective; raises AgreedError for a damaged shard.

    The ranks meet after every shard: reading all of them may take longer than the timeout of a collective.
    """
    own = corpora if group.world.local_rank == 0 else []
    shards = verified_shards(own, show_progress=group.world.rank == 0)
    while group.all_reduce_sum([group.call(lambda: next(shards, None) is not None)]) != [0]:
        pass
