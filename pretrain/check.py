"""What a run needs, opened and checked before a device is taken."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.folder import RunFolder
from pretrain.batching.vocabulary import Vocabulary, vocabulary_of
from pretrain.config import PretrainConfig
from pretrain.corpus.reader import Corpus, open_corpus
from pretrain.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from pretrain.modeling.build import check_tokenizer, resolve_config, usable_positions
from pretrain.modeling.depth import check_freeze
from pretrain.training.checkpoint_store import read_state
from pretrain.training.ds_config import find_ds_config, read_ds_config
from pretrain.training.engine import check_ds_config, check_precision
from pretrain.training.resume import Beginning, find_beginning, identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened."""

    train: Corpus
    evaluation: dict[str, Corpus]
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    model_config: PreTrainedConfig
    ds_config: dict[str, Any]


def check_run(config: PretrainConfig, world_size: int) -> Inputs:
    """Open what the config names. Raises UserError for the first thing that would keep the run from starting."""
    ds_config_path = find_ds_config(config.engine.ds_config)
    ds_config = read_ds_config(ds_config_path)
    check_ds_config(ds_config, ds_config_path)
    check_precision(ds_config)
    assert isinstance(config.corpus.train, str)
    train = _open("corpus.train", config.corpus.train)
    evaluation = {name: _open(f"corpus.eval.{name}", path) for name, path in config.corpus.eval.items()}
    for name, corpus in evaluation.items():
        if corpus.tokenizer_fingerprint != train.tokenizer_fingerprint:
            raise UserError(f"corpus.eval.{name}: {corpus.path} was built with another tokenizer than {train.path}")
    check_tokenizer(config.model, train.tokenizer_fingerprint, train.path)
    tokenizer = load_tokenizer(train.tokenizer_path)
    vocabulary = vocabulary_of(tokenizer)
    if config.masking.unit != "token" and vocabulary.word_marks is None:
        raise UserError(
            f"masking.unit is '{config.masking.unit}', but the tokenizer of {train.path} does not mark where words "
            "begin as WordPiece, byte-level BPE or SentencePiece do; expected 'token'"
        )
    model_config = resolve_config(config.model, tokenizer)
    if config.model.freeze:
        with torch.device("meta"):
            check_freeze(config.model.freeze, AutoModelForMaskedLM.from_config(model_config))
    positions = usable_positions(model_config)
    if positions is not None and config.batch.max_seq_length > positions:
        raise UserError(
            f"batch.max_seq_length is {config.batch.max_seq_length}, but the model's positions suffice for {positions}"
        )
    if config.batch.max_seq_length <= vocabulary.frame:
        raise UserError(
            f"batch.max_seq_length leaves no room beside the {vocabulary.frame} special tokens of a sequence"
        )
    if config.batch.sequences < world_size:
        log.warning(
            "batch.sequences is %d, fewer than the %d ranks: some will compute padding",
            config.batch.sequences,
            world_size,
        )
    return Inputs(train, evaluation, tokenizer, vocabulary, model_config, ds_config)


def run_identity(config: PretrainConfig, inputs: Inputs) -> dict[str, Any]:
    """See `pretrain.training.resume.identity`."""
    return identity(config.model_dump(mode="json"), inputs.model_config.to_dict(), inputs.train.fingerprint)


def check_beginning(config: PretrainConfig, inputs: Inputs) -> Beginning:
    """Which checkpoint the run starts from, if any. Raises UserError for one that it cannot start from.

    Reads the whole checkpoint to verify it: for the launcher and rank 0.
    """
    folder = RunFolder(Path(config.run.dir).absolute())
    beginning = find_beginning(config.run, folder, run_identity(config, inputs))
    if beginning.checkpoint is not None and beginning.fork:
        tokenizer = load_tokenizer(beginning.checkpoint / "hf")
        if tokenizer_fingerprint(tokenizer) != inputs.train.tokenizer_fingerprint:
            raise UserError(
                f"run.resume: the model in {beginning.checkpoint} has another tokenizer than the corpus "
                f"{inputs.train.path}; build the corpus again with `--tokenizer` naming {beginning.checkpoint / 'hf'}"
            )
        step, steps = read_state(beginning.checkpoint)["progress"]["step"], config.schedule.steps
        if steps is not None and step >= steps:
            raise UserError(
                f"schedule.steps is {steps}, but a fork counts on from its parent's steps, and {beginning.checkpoint} "
                f"has {step} behind it"
            )
    return beginning


def _open(key: str, path: str) -> Corpus:
    try:
        return open_corpus(Path(path))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
