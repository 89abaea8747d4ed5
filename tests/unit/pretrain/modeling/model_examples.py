"""Tiny models of several architectures, and microbatches to train them on."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

from experiment.models.tokenizer import load_tokenizer
from pretrain.batching.batch import IGNORED, Microbatch
from pretrain.batching.batch_maker import BatchMaker, MaskedCorpus
from pretrain.batching.masking import Masker
from pretrain.batching.order import BatchSizes, CorpusStream, ShuffledOrder
from pretrain.batching.packing import MicrobatchLayout
from pretrain.batching.sequences import open_index
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.config import MaskingConfig, ModelConfig
from pretrain.corpus.reader import open_corpus
from pretrain.modeling.build import BuiltModel, build_model
from pretrain.modeling.model_config import resolve_model_config

WIDTH = 60
LOCAL_WINDOW = 12  # of ModernBERT
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}

_BERT_LIKE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 70,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,  # large, so that a leak from one sequence to another shows
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "electra": _BERT_LIKE | {"embedding_size": 16},
    "distilbert": {
        "dim": 24,
        "n_layers": 3,
        "n_heads": 2,
        "hidden_dim": 40,
        "max_position_embeddings": 70,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.1,
    },
    "modernbert": {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 70,
        "local_attention": LOCAL_WINDOW,
        "initializer_range": 0.1,
    },
    "eurobert": {**TINY, "num_key_value_heads": 1},
    "deberta-v2": _BERT_LIKE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "mpnet": _BERT_LIKE,
}
CONFIGS["deberta"] = CONFIGS["deberta-v2"]
CONFIGS["released deberta"] = CONFIGS["deberta-v2"] | {"model_type": "deberta-v2", "legacy": False}
PACKED = ("bert", "roberta", "electra", "distilbert", "modernbert")
PADDED = ("deberta-v2", "mpnet")


@dataclass(frozen=True)
class Example:
    """A model as deepcloze builds it, the same model as transformers builds it, and a global batch."""

    built: BuiltModel
    plain: PreTrainedModel
    microbatches: list[Microbatch]
    maker: BatchMaker


@dataclass(frozen=True)
class Sequence:
    """One sequence of a microbatch, as input of its own."""

    slots: Tensor  # flattened slots of its tokens
    input_ids: Tensor  # [T]
    labels: Tensor  # [T], IGNORED where nothing is predicted


def sequences(microbatch: Microbatch) -> list[Sequence]:
    """Split a microbatch into its sequences."""
    labels = torch.full((microbatch.input_ids.numel(),), IGNORED)
    real = microbatch.labels != IGNORED
    labels[microbatch.masked_positions[real]] = microbatch.labels[real]
    segments, ids = microbatch.segments.reshape(-1), microbatch.input_ids.reshape(-1)
    found = [torch.nonzero(segments == segment)[:, 0] for segment in segments.unique() if segment != 0]
    return [Sequence(slots, ids[slots], labels[slots]) for slots in found]


def make_example(model_type: str, corpus_folder: Path) -> Example:
    """The vocabulary is that of the corpus's tokenizer."""
    corpus = open_corpus(corpus_folder)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    settings = ModelConfig(config={"model_type": model_type} | CONFIGS[model_type])
    config = resolve_model_config(settings, tokenizer)
    built = build_model(settings, config, seed=3)
    plain = AutoModelForMaskedLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    plain.load_state_dict(built.model.state_dict())
    vocabulary = build_vocabulary(tokenizer)
    index = open_index(corpus, WIDTH - vocabulary.num_special_tokens, corpus.path)
    maker = BatchMaker(
        (MaskedCorpus(corpus, index, Masker(vocabulary, MaskingConfig(), seed=5, corpus=corpus.fingerprint)),),
        ShuffledOrder((CorpusStream(len(index), seed=5),), BatchSizes(23)),
        vocabulary,
        MicrobatchLayout(WIDTH, 4 * WIDTH, "packed" if built.packed else "padded", built.first_position),
    )
    return Example(built, plain.eval(), maker[0].microbatches, maker)
