"""Models, tokenizers and folders for tests of modeling."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from model_examples import TINY, Example, make_example
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from experiment.models.tokenizer import load_tokenizer, save_tokenizer


@pytest.fixture(scope="session")
def example(wordpiece_corpus: Path, byte_level_corpus: Path) -> Callable[[str], Example]:
    """Model type -> Example, with copies of models that are built once; the corpus of RoBERTa is byte-level."""

    @cache
    def made(model_type: str) -> Example:
        return make_example(model_type, byte_level_corpus if model_type == "roberta" else wordpiece_corpus)

    def make(model_type: str) -> Example:
        original = made(model_type)
        model, plain = copy.deepcopy((original.built.model, original.plain))
        return replace(original, built=replace(original.built, model=model), plain=plain)

    return make


@pytest.fixture(scope="session")
def tokenizer(wordpiece: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(wordpiece)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder of a masked-LM BERT in half precision."""
    path = tmp_path / "start"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY)).to(
        torch.bfloat16
    ).save_pretrained(path)
    save_tokenizer(tokenizer, path)
    return path
