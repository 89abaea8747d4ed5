"""Resolve a run: config -> everything that is known before a device is used.

`resolve` opens the files that the config names, checks that they fit together, and decides which checkpoint the run
starts from. The launcher, every rank, `--dry_run` and sweeps call it. The code below takes the typed result.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from experiment.errors import UserError, user_errors_in
from experiment.models.model_folder import load_model_config
from experiment.models.model_names import local_model
from experiment.models.tokenizer import default_length, load_tokenizer, tokenizer_fingerprint
from experiment.models.transformers_models import check_freeze, configured_positions, max_positions
from experiment.run_files.checkpoints import Verify, state_around, verify_descriptions
from experiment.run_files.run_folder import RunFolder
from experiment.storage import is_url
from experiment.tracking.tracker import check_tracking
from pretrain.batching.vocabulary import Vocabulary, build_vocabulary, check_word_boundaries
from pretrain.config import CorpusConfig, ModelConfig, PretrainConfig, WeightedCorpus
from pretrain.corpus.cache import open_metadata
from pretrain.corpus.reader import Corpus, open_corpus, unique_names
from pretrain.ds_configs import preset_or_path
from pretrain.engine.deepspeed_settings import DeepSpeedSettings, load_settings
from pretrain.modeling.model_config import check_tokenizer, resolve_model_config
from pretrain.modeling.output_bias import output_bias_of
from pretrain.modeling.random_model import meta_model
from pretrain.modeling.resize import has_learned_positions
from pretrain.resume import (
    ResumePlan,
    ResumePoint,
    check_fork_length,
    find_resume_candidates,
    locate_model,
    plan_resume,
)
from pretrain.run_identity import run_identity

log = logging.getLogger(__name__)

T = TypeVar("T")

ONLY_IN_FP32 = ("fnet",)  # torch has no Fourier transforms in 16 bit


@dataclass(frozen=True)
class TrainingCorpus:
    """A corpus of the training mixture, or the only one."""

    name: str  # unique in the mixture
    corpus: Corpus
    weight: float = 1.0  # share of the tokens, relative to the weights of the others


@dataclass(frozen=True)
class ResolvedRun:
    """Everything about a run that is known before a device is used."""

    config: PretrainConfig  # with absolute paths, as written to RUN/config.yaml
    folder: RunFolder
    deepspeed: DeepSpeedSettings
    corpora: tuple[TrainingCorpus, ...]
    held_out: Mapping[str, Corpus]  # by name
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    model_source: ModelConfig  # source of the model: section `model`, or the checkpoint to continue from
    model_config: PreTrainedConfig
    num_parameters: int
    identity: Mapping[str, Any]  # see `run_identity`
    resume_plan: ResumePlan

    @property
    def all_corpora(self) -> list[Corpus]:
        """The corpora of the training mixture, then the held-out ones."""
        return [*(given.corpus for given in self.corpora), *self.held_out.values()]


class Decide(Protocol):
    """Calls a function that chooses among checkpoints, and returns the choice."""

    def __call__(self, choose: Callable[[], T], /) -> T: ...


def resolve(
    config: PretrainConfig,
    world_size: int,
    decide: Decide = lambda choose, /: choose(),
    verify: Verify = verify_descriptions,
    find_model: Callable[[str], Path] = local_model,
    copy_corpora: Callable[[CorpusConfig], Mapping[str, Path]] = lambda config: {},
) -> ResolvedRun:
    """Resolve and check a run. Raises UserError for the first thing that would keep it from starting.

    Args:
        decide: ranks pass `CpuGroup.from_rank0`, so that all of them use rank 0's choice even if a checkpoint appears
            or disappears meanwhile.
        verify: returns the problem of a checkpoint. Ranks, which load it, read all of it.
        find_model: the folder of a model by its name. Ranks download one of the Hub once on each host.
        copy_corpora: makes copies of the corpora, and returns their folders by the names in the config. The documents
            of a URL without a copy cannot be read.
    """
    deepspeed = load_settings(config.engine.ds_config)
    config = _with_absolute_paths(config, deepspeed.path)
    decide(lambda: check_tracking(config.tracking))  # only rank 0 tracks
    folder = RunFolder(Path(config.run.dir))
    point = decide(lambda: find_resume_candidates(config.run, folder, config.checkpoint.mirror)).choose(verify)
    located, model_source = decide(lambda: locate_model(config.model, point, config.checkpoint.mirror))
    config, model_source = config.model_copy(update={"model": located}), _with_folder(model_source, find_model)
    corpora, held_out = _open_corpora(config.corpus, copy_corpora(config.corpus))
    train = corpora[0].corpus
    check_tokenizer(model_source, train.tokenizer_fingerprint, train.path)
    tokenizer = load_tokenizer(train.tokenizer_path)
    vocabulary = build_vocabulary(tokenizer)
    if tokenizer.cls_token is not None and not vocabulary.num_special_tokens:
        log.warning(
            "the tokenizer of %s has the token %s, but adds no special tokens to a text, so sequences have none; if "
            "that is not intended, add a post-processor to its tokenizer.json",
            train.path,
            tokenizer.cls_token,
        )
    if config.masking.unit != "token":
        all_corpora = [*(given.corpus for given in corpora), *held_out.values()]
        check_word_boundaries(config.masking.unit, all_corpora, vocabulary)
    model_config = resolve_model_config(model_source, tokenizer)
    _check_precision(model_config.model_type, deepspeed)
    _check_layer_drop(model_config, deepspeed)
    _check_quantization(model_config)
    skeleton = meta_model(model_config)
    _check_parameters(skeleton)
    if config.model.output_bias == "log_frequency":
        output_bias_of(skeleton)
    check_freeze(config.model.freeze, skeleton)
    _check_layer_decay(config.optimizer.layer_decay, skeleton)
    _check_batches(config, max_positions(skeleton), vocabulary, world_size)
    earlier = model_source.init_from or (None if point is None else point.checkpoint / "hf")
    _limit_tokenizer(tokenizer, config, skeleton, earlier)
    fingerprints = [(given.corpus.fingerprint, given.weight) for given in corpora]
    affixes = (vocabulary.prefix, vocabulary.suffix)
    fields = model_config.to_dict()
    if point is not None and model_source.init_from == str(point.checkpoint / "hf"):
        # As the run began: `resize_model` may have untied the decoder since.
        tied = point.state["identity"].get("model.tie_word_embeddings")
        fields |= {} if tied is None else {"tie_word_embeddings": tied}
    identity = run_identity(config, fields, fingerprints, affixes, deepspeed.raw)
    return ResolvedRun(
        config=config,
        folder=folder,
        deepspeed=deepspeed,
        corpora=corpora,
        held_out=held_out,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        model_source=model_source,
        model_config=model_config,
        num_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        identity=identity,
        resume_plan=decide(lambda: _plan_resume(config, model_source, point, identity, corpora)),
    )


def _with_absolute_paths(config: PretrainConfig, ds_config: Path) -> PretrainConfig:
    """Return the config with every path absolute but `model.init_from` and presets, so that RUN/config.yaml starts the
    same run from any directory."""
    run, model, corpus = config.run, config.model, config.corpus
    train: str | tuple[WeightedCorpus, ...]
    if isinstance(corpus.train, str):
        train = _absolute(corpus.train)
    else:
        train = tuple(given.model_copy(update={"path": _absolute(given.path)}) for given in corpus.train)
    resume = run.resume if run.parent is None else _absolute(run.parent)
    added_tokens = None if model.added_tokens is None else _absolute(model.added_tokens)
    sections = {
        "run": run.model_copy(update={"dir": _absolute(run.dir), "resume": resume}),
        "model": model.model_copy(update={"added_tokens": added_tokens}),
        "corpus": corpus.model_copy(
            update={
                "train": train,
                "eval": {name: _absolute(path) for name, path in corpus.eval.items()},
                "cache": None if corpus.cache is None else _absolute(corpus.cache),
            }
        ),
        "engine": config.engine.model_copy(update={"ds_config": preset_or_path(ds_config)}),
    }
    return config.model_copy(update=sections)


def _with_folder(model: ModelConfig, find_model: Callable[[str], Path]) -> ModelConfig:
    """Return the section `model` with a folder in place of the name of a model of the Hub."""
    if model.init_from is None:
        return model
    with user_errors_in("model.init_from"):
        return model.model_copy(update={"init_from": str(find_model(model.init_from))})


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).absolute())


def _open_corpora(
    config: CorpusConfig, copies: Mapping[str, Path]
) -> tuple[tuple[TrainingCorpus, ...], dict[str, Corpus]]:
    """Return the training corpora, and the held-out ones by name. Raises UserError unless all have the same
    tokenizer."""
    corpora = _open_mixture(config.train, copies)
    held_out = {name: _open_corpus(f"corpus.eval.{name}", path, copies) for name, path in config.eval.items()}
    first, *others = [given.corpus for given in corpora]
    keys = [("corpus.train", corpus) for corpus in others]
    keys += [(f"corpus.eval.{name}", corpus) for name, corpus in held_out.items()]
    for key, corpus in keys:
        if corpus.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(f"{key}: {corpus.path} was built with another tokenizer than {first.path}")
    for corpus in (first, *others):
        for line in corpus.manifest.unknown_warnings(corpus.path):
            log.warning("%s", line)
    trained = {given.corpus.fingerprint for given in corpora}
    for name, corpus in held_out.items():
        if corpus.fingerprint in trained:
            log.warning(
                "corpus.eval.%s: %s is also in corpus.train, so it is not held out, and may have the masks of the "
                "first epoch; `deepcloze corpus --holdout N` splits documents off",
                name,
                corpus.path,
            )
    return corpora, held_out


def _open_mixture(train: str | Sequence[WeightedCorpus], copies: Mapping[str, Path]) -> tuple[TrainingCorpus, ...]:
    if isinstance(train, str):
        corpus = _open_corpus("corpus.train", train, copies)
        return (TrainingCorpus(corpus.name, corpus),)
    opened = [_open_corpus("corpus.train", given.path, copies) for given in train]
    for number, corpus in enumerate(opened):
        for other in opened[:number]:
            if corpus.fingerprint == other.fingerprint:
                raise UserError(f"corpus.train: {other.path} and {corpus.path} are the same corpus; add up the weights")
    return tuple(
        TrainingCorpus(name, corpus, given.weight)
        for name, corpus, given in zip(unique_names([given.path for given in train]), opened, train, strict=True)
    )


def _open_corpus(key: str, path: str, copies: Mapping[str, Path]) -> Corpus:
    with user_errors_in(key):
        return open_corpus(copies[path]) if path in copies else open_metadata(path)


def _check_precision(model_type: str, deepspeed: DeepSpeedSettings) -> None:
    """Raise UserError for a type of model that cannot compute in the precision of the run."""
    if model_type in ONLY_IN_FP32 and deepspeed.precision != "fp32":
        raise UserError(
            f"engine.ds_config: '{model_type}' computes in fp32 only, found {deepspeed.precision}; "
            f"use --engine.ds_config={deepspeed.preset('fp32', deepspeed.offload)}"
        )


def _check_layer_drop(model_config: PreTrainedConfig, deepspeed: DeepSpeedSettings) -> None:
    """Raise UserError for LayerDrop where DeepSpeed communicates or offloads gradients in the backward pass: each rank
    drops other layers, which have no gradients then."""
    for field in ("encoder_layerdrop", "decoder_layerdrop", "layerdrop"):
        rate = getattr(model_config, field, 0)
        if rate and (deepspeed.zero_stage > 1 or deepspeed.offload != "none"):
            raise UserError(
                f"model.config.{field} is {rate}: dropping layers works at ZeRO 0 and 1 without offload only; "
                f"use --engine.ds_config=ds_configs/{deepspeed.precision}_zero1.json, or set it to 0"
            )


def _check_quantization(model_config: PreTrainedConfig) -> None:
    """Raise UserError for I-BERT with integer arithmetic."""
    if getattr(model_config, "quant_mode", False):
        raise UserError(
            f"model.config.quant_mode: '{model_config.model_type}' quantizes by ranges of activations, which depend on "
            "the microbatches; set it to false"
        )


def _check_parameters(model: PreTrainedModel) -> None:
    """Raise UserError for a parameter without elements, of which DeepSpeed keeps no optimizer state."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            kind = model.config.model_type
            raise UserError(f"model: '{kind}' cannot be trained with these sizes: {name} has no elements")


def _check_layer_decay(layer_decay: float, model: PreTrainedModel) -> None:
    """Raise UserError for a model with a decoder, such as Funnel and BART: its layers are numbered from 0 again."""
    layers = ("decoder.layers.", "decoder.block.")
    if layer_decay != 1 and any(name.startswith(layers) for name, _ in model.base_model.named_modules()):
        raise UserError(
            f"optimizer.layer_decay is {layer_decay}; expected 1: '{model.config.model_type}' has a decoder"
        )


def _check_batches(config: PretrainConfig, positions: int | None, vocabulary: Vocabulary, world_size: int) -> None:
    """Raise UserError for sequences that do not fit the model; warn of batches that do not occupy all ranks."""
    lengths = {"batch.max_seq_length": config.batch.max_seq_length} | {
        f"max_seq_length of number {number + 1} of schedule.stages": stage.max_seq_length
        for number, stage in enumerate(config.stages)
    }
    for key, length in lengths.items():
        if positions is not None and length > positions:
            extend = (
                "raise them in model.config"
                if config.model.init_from is None
                else f"set model.max_positions: {length} to extend the model"
            )
            raise UserError(f"{key} is {length}, but the model has {positions} positions; lower it, or {extend}")
        if length <= vocabulary.num_special_tokens:
            raise UserError(
                f"{key} must be greater than the {vocabulary.num_special_tokens} special tokens of a sequence"
            )
    fewest = min(stage.sequences for stage in config.stages)
    if fewest < world_size:
        log.warning("a batch has %d sequences, fewer than the %d ranks: some compute padding only", fewest, world_size)


def _limit_tokenizer(
    tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, model: PreTrainedModel, earlier: str | Path | None
) -> None:
    """Let `truncation=True` cut texts at the length that the model is trained for, where positions beyond it stay
    untrained because each of them has an embedding of its own.

    earlier: the folder of the model to continue, which is trained up to its own limit; None: a new model.
    """
    if (positions := configured_positions(model)) is None:
        return
    trained = max(stage.max_seq_length for stage in config.stages)
    tokenizer.model_max_length = max(positions, trained)  # `trained` is larger only if the model has no limit
    if earlier is not None:
        model_before = meta_model(load_model_config(Path(earlier)))
        trained = max(trained, default_length(load_tokenizer(Path(earlier)), model_before) or 0)
    if trained < positions and has_learned_positions(model):
        tokenizer.model_max_length = trained
        log.info(
            "model.%s: only %d of the model's %d positions are trained, because no sequence is longer; the tokenizer "
            "in the checkpoints cuts texts there",
            "config.max_position_embeddings" if config.model.max_positions is None else "max_positions",
            trained,
            positions,
        )


def _plan_resume(
    config: PretrainConfig,
    model_source: ModelConfig,
    point: ResumePoint | None,
    identity: Mapping[str, Any],
    corpora: Sequence[TrainingCorpus],
) -> ResumePlan:
    plan = plan_resume(point, identity)
    _check_fork_tokenizer(plan, corpora[0].corpus)
    check_fork_length(plan, config.schedule.known_steps)  # `open_stream` knows the steps in epochs or tokens
    if plan.checkpoint is None and model_source.init_from is not None:
        _warn_of_same_seed(config, corpora, Path(model_source.init_from))
    return plan


def _check_fork_tokenizer(plan: ResumePlan, train: Corpus) -> None:
    """Raise UserError for a fork of a model with another tokenizer."""
    if plan.checkpoint is None or not plan.fork:
        return
    folder = plan.checkpoint / "hf"
    if tokenizer_fingerprint(load_tokenizer(folder)) != train.tokenizer_fingerprint:
        raise UserError(
            f"run.resume: the model in {plan.checkpoint} has another tokenizer than the corpus {train.path}; "
            f"build the corpus again with `--tokenizer {folder}`"
        )


def _warn_of_same_seed(config: PretrainConfig, corpora: Sequence[TrainingCorpus], model: Path) -> None:
    """Order and masks follow from seed, corpus, stage and the sequences: with all unchanged, a run repeats the batches
    of the model's own run. Another sequence length changes the sequences if documents are longer."""
    before = state_around(model).get("identity")
    if before is None or before["run.seed"] != config.run.seed:
        return
    lengths = [stage[1] for stage in before["schedule.stages"]] or [before["batch.max_seq_length"]]
    stages = [(stage.max_seq_length, length) for stage, length in zip(config.stages, lengths, strict=False)]
    for given in corpora:
        longest = given.corpus.manifest.length_percentiles["100"]
        repeats = any(now == then or longest <= min(now, then) for now, then in stages)
        if repeats and given.corpus.fingerprint in str(before["corpus.train"]):
            log.warning(
                "the model in %s was also trained on %s with run.seed %d; use another seed, or it sees the same "
                "batches with the same masks again",
                model,
                given.corpus.path,
                config.run.seed,
            )
