from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiment.models.tokenizer import load_tokenizer
from pretrain.corpus.options import TokenizerOptions
from pretrain.corpus.tokenization import DocumentEncoder, hide_special_tokens, tokenizer_spec
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


PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<mask>", 0.0)]
PIECES += [(piece, -2.0) for piece in ("▁a", "<", ">", "/", "s", "▁")]


def test_a_special_token_in_a_unigram_vocabulary_is_ordinary_text() -> None:
    """Catches an HTML tag that is one piece of XLM-RoBERTa's vocabulary, and moved ids."""
    tokenizer = Tokenizer(models.Unigram(PIECES, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", mask_token="<mask>"
    )
    encoded = DocumentEncoder(tokenizer_spec(wrapped)).encode(["a <s>", "a"])
    assert (encoded.ids.tolist(), encoded.special) == ([5, 10, 6, 9, 7, 5], None)


@pytest.mark.parametrize("added", [False, True])
def test_a_special_token_in_a_vocabulary_of_words_is_ordinary_text(added: bool) -> None:
    """Catches a tokenizer that splits at spaces, and so finds [MASK] in its vocabulary; also one without a role."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    role = {} if added else {"mask_token": "[MASK]"}
    if added:
        tokenizer.add_special_tokens(["[MASK]"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **role)
    encoded = DocumentEncoder(tokenizer_spec(wrapped)).encode(["a", "b", "a [MASK]", "[MASK]"])
    assert (encoded.ids.tolist(), encoded.special) == ([2, 0, 2, 0, 0], None)


def test_a_special_token_that_merges_give_is_detected() -> None:
    """Catches a corpus with special tokens: this one cannot be renamed."""
    vocabulary = {"<unk>": 0, "<s>": 1, "<": 2, "s": 3, ">": 4, "<s": 5, "a": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")], unk_token="<unk>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    assert DocumentEncoder(tokenizer_spec(wrapped)).encode(["a", "<s>a"]).special == 1


def test_counts_per_document(vocabulary_folder: Path) -> None:
    """Catches counts assigned to the wrong document when one has no token."""
    tokenizer = load_tokenizer(vocabulary_folder)
    encoded = DocumentEncoder(tokenizer_spec(tokenizer)).encode(["\x00", "the ŧ 我们去北京大学", "\x01", "a river", ""])
    assert encoded.lengths.tolist() == [0, 9, 0, 2, 0]
    assert encoded.unknown.tolist() == [0, 8, 0, 0, 0]
    assert encoded.words.tolist() == [1, 3, 1, 2, 0]
    assert encoded.unspaced.tolist() == [0, 7, 0, 0, 0]


def test_unknown_texts_are_those_of_a_sample(vocabulary_folder: Path) -> None:
    """Catches places in the normalized text, and documents that are all encoded twice."""
    encoder = DocumentEncoder(tokenizer_spec(load_tokenizer(vocabulary_folder)))
    long = "a" * 30 + "ŧ" * 30
    texts = ["the river", f"The  Éŧ {long}", *["a Éŧ of" + 900 * " "] * 30]
    assert encoder.unknown_texts(texts, encoder.encode(texts)) == {"Éŧ": 12, long[:40]: 1}
    texts = [20_000 * "a river " + "ŧ"]
    assert encoder.unknown_texts(texts, encoder.encode(texts)) == {}


def test_added_tokens_keep_their_ids_when_special_ones_are_hidden() -> None:
    """Catches words of DeBERTa-v3 or ModernBERT that are stored with the ids of others: their special tokens are not in
    the vocabulary, and `tokenizers` numbers added tokens in their order."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[MASK]"])
    tokenizer.add_tokens(["word"])
    hidden = Tokenizer.from_str(hide_special_tokens(tokenizer.to_str(), {2, 3}))
    assert hidden.encode("a word").ids == tokenizer.encode("a word").ids == [1, 4]
    assert not {2, 3} & set(hidden.encode("[CLS] [MASK]").ids)
