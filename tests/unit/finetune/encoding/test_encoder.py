import copy
import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    CanineTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLNetTokenizer,
)
from transformers.models.canine import tokenization_canine

from experiment.errors import UserError
from experiment.models.tokenizer import load_tokenizer
from finetune.encoding.encoder import Encoder, load_task_tokenizer, most_context, window_around, windows
from finetune.kinds.classification import Config


def xlnet() -> Encoder:
    """Special tokens at the end only, three token types."""
    specials = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]
    vocabulary = [(token, 0.0) for token in specials] + [(f"▁word{n}", -3.0) for n in range(9)]
    return Encoder(XLNetTokenizer(vocab=vocabulary), 16, token_types=True)


def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """Special tokens as in BERT, in RoBERTa, or none as in GPT-2."""
    specials = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*specials.values(), *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    processing = {"bert": processors.BertProcessing, "roberta": processors.RobertaProcessing}.get(kind)
    backend.post_processor = processing(("</s>", 2), ("<s>", 1)) if processing else processors.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


PAIRED = ["bare canine", "bert", "canine", "gpt2", "roberta"]  # for `paired`


@cache
def paired(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer that puts texts into pairs."""
    if kind == "canine":
        with pytest.MonkeyPatch.context() as patch:  # a vocabulary of a million characters takes a second to make
            patch.setattr(tokenization_canine, "UNICODE_VOCAB_SIZE", tokenization_canine.MASK + 1)
            return CanineTokenizer()
    if kind == "bare canine":
        bare = copy.copy(paired("canine"))
        bare.special_tokens_pattern = "none"  # nothing between the texts, as in CTRL
        return bare
    return byte_level(kind)


@given(st.sampled_from(PAIRED), st.sampled_from(["left", "right"]), st.integers(6, 24), st.data())
def test_a_pair_is_cut_as_the_tokenizer_does(kind: str, side: str, length: int, data: st.DataObject) -> None:
    """Catches a token too many or too few of one of the texts, and the wrong end, in fast and in slow tokenizers."""
    tokenizer = paired(kind)
    tokenizer.truncation_side = side
    smallest = 0 if tokenizer.is_fast else 1  # a slow one makes a single text of a pair if it cuts at the left
    texts = [data.draw(st.text("abc é", min_size=smallest, max_size=40)) for _ in range(2)]
    options = {"verbose": False, "return_token_type_ids": True}
    expected = tokenizer(*texts, truncation="longest_first", max_length=length, **options)
    found = Encoder(tokenizer, length, token_types=True).encode(*texts)
    assert found.input_ids.tolist() == (expected["input_ids"] or [tokenizer.mask_token_id])
    assert found.token_type_ids.tolist() == (expected["token_type_ids"] or [0])
    assert found.cut == max(len(tokenizer(*texts, verbose=False)["input_ids"]) - len(found), 0)


@given(st.sampled_from(PAIRED), st.sampled_from(["left", "right"]), st.integers(6, 24), st.data())
def test_texts_that_are_encoded_together(kind: str, side: str, length: int, data: st.DataObject) -> None:
    """Catches rows in another order, and tokens, types or counts of one text in the sequence of another."""
    tokenizer = paired(kind)
    tokenizer.truncation_side = side
    texts = st.text("abc é", min_size=0 if tokenizer.is_fast else 1, max_size=40)
    rows = data.draw(st.lists(st.tuples(texts, st.none() | texts), max_size=6))
    encoder = Encoder(tokenizer, length, token_types=True)
    together = [encoder.encode_all(rows), [encoder.with_cache(rows).encode(*row) for row in rows]]
    for found in together:
        for tokens, alone in zip(found, [encoder.encode(*row) for row in rows], strict=True):
            assert tokens.input_ids.tolist() == alone.input_ids.tolist()
            assert tokens.token_type_ids.tolist() == alone.token_type_ids.tolist()
            assert (tokens.input_ids.dtype, tokens.cut) == (alone.input_ids.dtype, alone.cut)


@pytest.mark.parametrize("family", ["bert", "xlnet"])
@pytest.mark.parametrize("texts", [("word1 word2",), ("word1 word2", "word3")])
def test_assembled_ids_are_those_of_the_tokenizer(encoder: Path, family: str, texts: tuple[str, ...]) -> None:
    """Catches special tokens or token types that differ from those of a text that is encoded at once."""
    made = Encoder(load_tokenizer(encoder), 16, token_types=True) if family == "bert" else xlnet()
    assembled, encoded = made.assemble(*(made.ids(text) for text in texts)), made.encode(*texts)
    assert assembled.input_ids.tolist() == encoded.input_ids.tolist()
    assert assembled.token_type_ids.tolist() == encoded.token_type_ids.tolist()
    assert made.room(len(texts)) == 16 - (len(encoded) - len(made.ids(" ".join(texts))))
    starts = made.starts(*(len(made.ids(text)) for text in texts))
    for start, text in zip(starts, texts, strict=True):
        ids = made.ids(text)
        assert encoded.input_ids.tolist()[start : start + len(ids)] == ids


def sentence_piece(*pieces: str) -> Encoder:
    """All pieces are equally likely, so text has as few as possible."""
    unigram = Tokenizer(models.Unigram([(piece, -1.0) for piece in ("<unk>", *pieces)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>"), 16, token_types=False)


def test_a_text_that_continues_another_begins_no_word(encoder: Path) -> None:
    """Catches a word mark of SentencePiece before punctuation that follows a blank, and dropped words."""
    made = sentence_piece("▁", "▁(", "(", ".", "▁.", "▁word1")
    texts = [". word1", " word1", ""]
    found = [made.tokenizer.convert_ids_to_tokens(ids) for ids in made.ids_of_continuations(texts)]
    assert found == [[".", "▁word1"], ["▁word1"], []]
    for other in (Encoder(load_tokenizer(encoder), 16, token_types=True), xlnet()):
        assert other.ids_of_continuations(texts) == other.ids_of_texts(texts)


@pytest.mark.parametrize("family", ["bert", "xlnet"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("words", [1, 13, 14, 15, 30, 60])
def test_the_length_of_a_cut_text(encoder: Path, family: str, special: bool, words: int) -> None:
    """Catches special tokens that count for each part of what was cut off, and a sequence that just fits."""
    made = Encoder(load_tokenizer(encoder), 16, True, special) if family == "bert" else xlnet()
    text = " ".join((["word1", "[SEP]"] * words)[:words])
    for texts in ((text,), (text, "word2")):
        whole = Encoder(made.tokenizer, 500, True, made.special_tokens_in_text).encode(*texts)
        found = made.encode(*texts)
        assert (len(found), found.cut) == (min(len(whole), 16), max(len(whole) - 16, 0))


def test_a_cut_text_is_tokenized_once(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second tokenization of each long text, only to count what was cut off. Also truncation of a pair by the
    tokenizer, which takes quadratic time."""
    made, calls = Encoder(load_tokenizer(encoder), 16, token_types=True), []
    made.room()  # finds the special tokens
    tokenize = type(made.tokenizer).__call__
    monkeypatch.setattr(type(made.tokenizer), "__call__", lambda *a, **k: calls.append(k) or tokenize(*a, **k))
    assert made.encode("word1 " * 100).cut == 86
    assert len(calls) == 1
    assert made.encode("word1 " * 100, "word2 " * 100).cut == 187
    assert len(calls) == 2
    assert "truncation" not in calls[1]


@pytest.mark.parametrize("text_pair", ["ghi jkl", ""])
def test_a_slow_tokenizer_does_not_warn_of_each_pair(text_pair: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning about overflowing tokens for each pair that is cut, also in the JSON log of a server."""
    assert len(Encoder(paired("canine"), 8, token_types=True).encode("abc def", text_pair)) == 8
    assert caplog.text == ""


def test_a_length_without_room_for_text_is_rejected(encoder: Path) -> None:
    """Catches empty windows, of which there would be infinitely many."""
    with pytest.raises(UserError, match="max_seq_length: 4 tokens leave no room"):
        Encoder(load_tokenizer(encoder), 4, token_types=True).room(2)


def test_every_word_has_tokens(encoder: Path) -> None:
    """Catches words of characters that the tokenizer drops: their tags would shift to the next word."""
    made = Encoder(load_tokenizer(encoder), 16, token_types=True)
    assert made.ids_of_words(["word1", "\u200b", "word2"]) == [[6], [1], [7]]
    assert made.ids_of_words([]) == []


WORDS = ["我", "在", "北京", "，", "用", "bert", "ไทย", "2", "、", "3", "年", "。", "a", "b", "きた"]


def test_words_of_a_script_without_spaces() -> None:
    """Catches tags on tokens of spaces, which Chinese text does not have, and words in other scripts without theirs."""
    made = Encoder(byte_level("roberta"), 16, token_types=False)
    texts = [" b" if word == "b" else word for word in WORDS]
    assert made.ids_of_words(WORDS) == [made.ids(text) for text in texts]
    spaced = ["我", *(f" {word}" for word in WORDS[1:])]
    assert replace(made, spaced_words=True).ids_of_words(WORDS) == [made.ids(text) for text in spaced]
    made = sentence_piece("▁", "▁(", *"我在，用23、年。ab", "北京", "bert", "ไทย", "きた", "▁b")
    found = [made.tokenizer.convert_ids_to_tokens(ids) for ids in made.ids_of_words(WORDS)]
    assert found == [["▁", "我"], *([text.replace(" ", "▁")] for text in texts[1:])]


def test_the_words_of_wordpiece_have_no_spaces(tmp_path: Path) -> None:
    """Catches other tokens in models whose tokenizers put spaces around Chinese characters themselves."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"(我在北京，用23、年。ab", "be", "ไ", "き"]
    pieces += [f"##{piece}" for piece in ["2", "年", "rt", "ท", "ย", "た"]]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    made = Encoder(BertTokenizer(str(tmp_path / "vocab.txt")), 16, token_types=True)
    assert made.ids_of_words(WORDS) == made.ids_of_texts(WORDS)


def test_a_word_or_a_text_without_tokens_has_one() -> None:
    """Catches a traceback for an empty word if the tokenizer has no unknown token, as many byte-level ones. And one for
    an empty text if it adds no special tokens, unless a longer text in the batch makes it a row of padding."""
    tokenizer = byte_level("gpt2")
    made = Encoder(tokenizer, 16, token_types=True)
    for ids in ([tokenizer.mask_token_id], made.ids("a")):  # models skip padding tokens
        assert made.ids_of_words(["", "a"])[0] == ids
        for tokens in (*made.encode_all([("", None), ("", "")]), made.assemble([]), made.assemble([], [])):
            assert torch.equal(tokens.input_ids, torch.tensor(ids))
            assert torch.equal(tokens.token_type_ids, torch.tensor([0]))
        tokenizer.mask_token, tokenizer.unk_token = None, tokenizer.pad_token


@given(st.integers(0, 300), st.integers(1, 40))
def test_windows_cover_all_positions_and_overlap(length: int, size: int) -> None:
    """Catches positions in no window, a window that is too long, and neighbours without common context."""
    found = windows(length, size)
    assert {position for window in found for position in window} == set(range(length))
    assert all(len(window) == min(size, length) for window in found)
    for first, second in pairwise(found):
        assert first.start < second.start
        assert first.stop - second.start >= size // 3
    for position in range(length):
        assert position in found[most_context(found, position)]
        around = window_around(position, length, size)
        assert position in around
        assert len(around) == min(size, length)
        if around.start > 0 and around.stop < length:
            assert position == around.start + size // 2


def test_a_tokenizer_with_further_ids_is_refused(tmp_path: Path) -> None:
    """Catches RoCBERT fine-tuned with zeros for the shapes and pronunciations of all characters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    for name in ("word_shape", "word_pronunciation"):
        (tmp_path / f"{name}.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RoCBertTokenizer"}')
    with pytest.raises(UserError, match=r"holds a RoCBertTokenizer; input_pronunciation_ids, input_shape_ids are not"):
        load_task_tokenizer(tmp_path, Config(train="f", validation="f"))
