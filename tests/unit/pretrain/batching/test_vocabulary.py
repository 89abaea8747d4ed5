from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer, save_tokenizer
from pretrain.batching.vocabulary import build_vocabulary
from pretrain.config import ModelConfig
from pretrain.modeling.model_config import resolve_model_config


def test_special_tokens_without_a_role_are_special(wordpiece: Path, tmp_path: Path) -> None:
    """Catches tokens that only tokenizer.json marks as special, and that are masked or drawn as random replacements."""
    tokenizer = load_tokenizer(wordpiece)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<extra_0>", special=True)])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("zedzedzed", special=False)])
    save_tokenizer(tokenizer, tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    special, word = loaded.convert_tokens_to_ids(["<extra_0>", "zedzedzed"])
    assert special not in loaded.all_special_ids, "otherwise the test says nothing"
    vocabulary = build_vocabulary(loaded)
    assert vocabulary.unmaskable[special]
    assert special not in vocabulary.replacements
    assert not vocabulary.unmaskable[word]
    assert word in vocabulary.replacements
    assert len(vocabulary.replacements) == len(loaded.get_vocab()) - 6


def word_level(words: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens are letters: of proteins, for instance."""
    special = {"CLS": 0, "SEP": 1, "PAD": 2, "UNK": 3, "MASK": 4}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="UNK"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing("CLS $A SEP SEP", None, [("CLS", 0), ("SEP", 1)])
    roles = {f"{name.lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def test_special_tokens_around_a_text_are_found() -> None:
    """Catches special tokens that are taken for the text between them, and a vocabulary without letters."""
    vocabulary = build_vocabulary(word_level({"!": 5, "##a": 6, "😀": 7}))
    assert (vocabulary.prefix, vocabulary.suffix) == ((0,), (1, 1))


def test_a_vocabulary_without_words_is_refused() -> None:
    """Catches a traceback for a tokenizer that makes no tokens of text."""
    with pytest.raises(UserError, match="makes no tokens of the words in its vocabulary"):
        build_vocabulary(word_level({}))


def test_ids_may_have_gaps() -> None:
    """Catches a new model with fewer embeddings than the largest id needs."""
    config = resolve_model_config(ModelConfig(config={"model_type": "bert"}), word_level({"a": 5, "b": 28}))
    assert config.vocab_size == 29
