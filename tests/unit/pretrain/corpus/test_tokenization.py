from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiment.tokenizer import load_tokenizer
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.tokenization import DocumentEncoder, tokenizer_spec
from pretrain.corpus.train_tokenizer import train_tokenizer

TEXT = "The river ran by the town .\nThe actor was born in the town by the river !\n" * 20 + "你好 世界 ünknown\n" * 3
TRICKS = "[CLS] [SEP] [PAD] [MASK] [UNK] <s> </s> <pad> <mask> <unk> [unused0] ##the x[MASK]y"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_text_never_gives_special_tokens(tmp_path: Path, kind: str) -> None:
    """Catches a literal [MASK] or </s> in the text that becomes the special token."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    train_tokenizer(TokenizerOptions(source=tmp_path / "a.txt", output=tmp_path / "t", vocab_size=400, kind=kind))
    spec = tokenizer_spec(load_tokenizer(tmp_path / "t"))
    encoded = DocumentEncoder(spec).encode([TRICKS, "the river", TRICKS.lower()])
    assert encoded.special is None
    assert not set(encoded.ids.tolist()) & set(spec.special_ids)
    assert len(spec.special_ids) == 4


def test_special_token_from_text_is_detected() -> None:
    """Catches a check that finds nothing: a tokenizer that splits at spaces finds [MASK] in its vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", mask_token="[MASK]")
    assert DocumentEncoder(tokenizer_spec(wrapped)).encode(["a", "b", "a [MASK]", "[MASK]"]).special == 2


def test_special_token_without_a_role_is_detected() -> None:
    """Catches a corpus with tokens that only tokenizer.json marks as special."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<extra_0>": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<extra_0>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert DocumentEncoder(tokenizer_spec(wrapped)).encode(["a", "a <extra_0>"]).special == 1


def test_counts_per_document(vocabulary_folder: Path) -> None:
    """Catches counts assigned to the wrong document when one has no token."""
    tokenizer = load_tokenizer(vocabulary_folder)
    encoded = DocumentEncoder(tokenizer_spec(tokenizer)).encode(["\x00", "the ŧ ŧ", "\x01", "a river", ""])
    assert encoded.lengths.tolist() == [0, 3, 0, 2, 0]
    assert encoded.unknown.tolist() == [0, 2, 0, 0, 0]
    assert encoded.words.tolist() == [1, 3, 1, 2, 0]
