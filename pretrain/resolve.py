"""What a run needs, opened and checked before a device is taken."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from experiment.checkpoints import find_model_folder, read_state
from experiment.errors import UserError
from experiment.hugging_face import max_positions
from experiment.run_folder import RunFolder
from experiment.tokenizer import load_tokenizer, tokenizer_fingerprint
from pretrain.batching.vocabulary import Vocabulary, build_vocabulary
from pretrain.config import CorpusConfig, PretrainConfig
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.engine.engine import check_ds_config, check_offload, check_precision
from pretrain.engine.settings import find_ds_config, read_ds_config
from pretrain.modeling.layer_ids import check_freeze
from pretrain.modeling.model_config import check_tokenizer, meta_model, resolve_model_config
from pretrain.training.resume import ResumePlan, identity, plan_resume

log = logging.getLogger(__name__)

_TOKENS_PER_WORD = 5.0  # more are rare in text that is written with spaces


@dataclass(frozen=True)
class TrainingCorpus:
    """A corpus of the mixture that is trained on; or the only one."""

    name: str  # unlike the others'
    corpus: Corpus
    weight: float = 1.0  # share of the tokens, relative to the others' weights


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened."""

    train: tuple[TrainingCorpus, ...]
    evaluation: dict[str, Corpus]
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    model_config: PreTrainedConfig
    ds_config: dict[str, Any]


def resolve_source(config: PretrainConfig) -> PretrainConfig:
    """With the Hugging Face folder that `model.init_from` means, which may be a checkpoint or a run, whose newest one
    it is then. Raises UserError."""
    if config.model.init_from is None:
        return config
    try:
        folder = find_model_folder(Path(config.model.init_from))
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    return config.model_copy(update={"model": config.model.model_copy(update={"init_from": str(folder)})})


def check_start(config: PretrainConfig, world_size: int) -> None:
    """All that can be told on the launching machine. Raises UserError for whatever would keep the run from starting."""
    resolved = resolve_source(config)
    check_beginning(resolved, check_run(resolved, world_size))


def check_run(config: PretrainConfig, world_size: int) -> Inputs:
    """Open what the config names, `resolve_source` behind it. Raises UserError for the first thing that would keep the
    run from starting."""
    ds_config_path = find_ds_config(config.engine.ds_config)
    ds_config = read_ds_config(ds_config_path)
    check_ds_config(ds_config, ds_config_path)
    check_precision(ds_config)
    check_offload(ds_config)
    mixture = _open_mixture(config.corpus)
    train = mixture[0].corpus
    evaluation = {name: _open(f"corpus.eval.{name}", path) for name, path in config.corpus.eval.items()}
    for name, corpus in evaluation.items():
        if corpus.tokenizer_fingerprint != train.tokenizer_fingerprint:
            raise UserError(f"corpus.eval.{name}: {corpus.path} was built with another tokenizer than {train.path}")
    check_tokenizer(config.model, train.tokenizer_fingerprint, train.path)
    tokenizer = load_tokenizer(train.tokenizer_path)
    vocabulary = build_vocabulary(tokenizer)
    if config.masking.unit != "token":
        _check_words(config.masking.unit, mixture, vocabulary)
    model_config = resolve_model_config(config.model, tokenizer)
    skeleton = meta_model(model_config)
    if config.model.freeze:
        check_freeze(config.model.freeze, skeleton)
    positions = max_positions(skeleton)
    lengths = {"batch.max_seq_length": config.batch.max_seq_length} | {
        f"max_seq_length of number {number + 1} of schedule.stages": stage.max_seq_length
        for number, stage in enumerate(config.stages)
    }
    for key, length in lengths.items():
        if positions is not None and length > positions:
            raise UserError(f"{key} is {length}, but the model's positions suffice for {positions}")
        if length <= vocabulary.num_special_tokens:
            raise UserError(
                f"{key} leaves no room beside the {vocabulary.num_special_tokens} special tokens of a sequence"
            )
    fewest = min(stage.sequences for stage in config.stages)
    if fewest < world_size:
        log.warning("a batch has %d sequences, fewer than the %d ranks: some will compute padding", fewest, world_size)
    return Inputs(mixture, evaluation, tokenizer, vocabulary, model_config, ds_config)


def _open_mixture(config: CorpusConfig) -> tuple[TrainingCorpus, ...]:
    if isinstance(config.train, str):
        corpus = _open("corpus.train", config.train)
        return (TrainingCorpus(corpus.name, corpus),)
    corpora = [_open("corpus.train", given.path) for given in config.train]
    first = corpora[0]
    for number, corpus in enumerate(corpora):
        if corpus.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(f"corpus.train: {corpus.path} was built with another tokenizer than {first.path}")
        for other in corpora[:number]:
            if corpus.fingerprint == other.fingerprint:
                raise UserError(f"corpus.train: {other.path} and {corpus.path} are the same corpus; add up the weights")
    return tuple(
        TrainingCorpus(name, corpus, given.weight)
        for name, corpus, given in zip(_names(corpora), corpora, config.train, strict=True)
    )


def _check_words(unit: str, mixture: tuple[TrainingCorpus, ...], vocabulary: Vocabulary) -> None:
    """Raises UserError where nothing tells words apart; warns of text that seems to be written without spaces."""
    for corpus in (given.corpus for given in mixture):
        if vocabulary.word_boundaries is None:
            raise UserError(
                f"masking.unit is '{unit}', but the tokenizer of {corpus.path} does not mark where words begin as "
                "WordPiece, byte-level BPE or SentencePiece do; expected 'token'"
            )
        if corpus.manifest.recipe.segmenter is None and corpus.manifest.tokens_per_word > _TOKENS_PER_WORD:
            log.warning(
                "masking.unit is '%s', but %s has %.1f tokens between white space: nothing tells its words apart. "
                "If it is Chinese, build it with --segmenter jieba; else masking.unit 'token' may serve better",
                unit,
                corpus.path,
                corpus.manifest.tokens_per_word,
            )


def _names(corpora: Sequence[Corpus]) -> list[str]:
    """The corpora's folder names, with as many folders above as tell them apart."""
    paths = [corpus.path.resolve() for corpus in corpora]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def run_identity(config: PretrainConfig, inputs: Inputs) -> dict[str, Any]:
    """See `pretrain.training.resume.identity`."""
    corpora = [(given.corpus.fingerprint, given.weight) for given in inputs.train]
    return identity(config, inputs.model_config.to_dict(), corpora)


def check_beginning(config: PretrainConfig, inputs: Inputs) -> ResumePlan:
    """Which checkpoint the run starts from, if any. Raises UserError for one that it cannot start from.

    Reads the whole checkpoint to verify it: for the launcher and rank 0.
    """
    folder = RunFolder(Path(config.run.dir).absolute())
    beginning = plan_resume(config.run, folder, run_identity(config, inputs))
    if beginning.checkpoint is not None and beginning.fork:
        tokenizer = load_tokenizer(beginning.checkpoint / "hf")
        train = inputs.train[0].corpus
        if tokenizer_fingerprint(tokenizer) != train.tokenizer_fingerprint:
            raise UserError(
                f"run.resume: the model in {beginning.checkpoint} has another tokenizer than the corpus "
                f"{train.path}; build the corpus again with `--tokenizer` naming {beginning.checkpoint / 'hf'}"
            )
        step, steps = read_state(beginning.checkpoint)["progress"]["step"], config.schedule.known_steps
        if steps is not None and step >= steps:
            raise UserError(
                f"the run has {steps} steps, but a fork counts on from its parent's steps, and {beginning.checkpoint} "
                f"has {step} behind it"
            )
    if beginning.checkpoint is None and config.model.init_from is not None:
        _warn_of_repetition(config, inputs, Path(config.model.init_from))
    return beginning


def _warn_of_repetition(config: PretrainConfig, inputs: Inputs, model: Path) -> None:
    """Order and masks follow from seed and corpus: what the model's own run began with would be met again just so."""
    if not (model.parent / "state.json").is_file():
        return
    before = read_state(model.parent)["identity"]
    for given in inputs.train:
        if before["run.seed"] == config.run.seed and given.corpus.fingerprint in str(before["corpus.train"]):
            log.warning(
                "the model in %s was trained on %s with run.seed %d too: with another seed it would not meet the same "
                "batches under the same masks again",
                model,
                given.corpus.path,
                config.run.seed,
            )


def _open(key: str, path: str) -> Corpus:
    try:
        return open_corpus(Path(path))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
