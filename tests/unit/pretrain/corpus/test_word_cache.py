"""Ids from the cache of words, compared with those that `tokenizers` computes for whole texts."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from pretrain.corpus import word_cache as module
from pretrain.corpus.word_cache import WordCache, encodes_words_independently

VOCABULARY = ["[UNK]", "[MASK]", "the", "river", "##s", "un", "##known", "u", ".", "'", "a", "##b", "e", "_", "你", "-"]
# Whitespace of all kinds, controls, punctuation, accents (one of them a character of its own), long words.
PARTS = [
    "the",
    "River",
    "rivers",
    "unknown",
    "ünknown",
    "É",
    "e\u0301",
    "a",
    "ab",
    "x" * 120,
    "你好",
    "[MASK]",
    "[UNK]",
]
PARTS += [".", "...", "'", "’", "—", "_", "-", "<br", "\0", "\x1c", "\x7f", "\u200b", "\ufffd", "ß", "Σ", "İ", "new"]
PARTS += [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\xa0", "\u2028", "\u3000"]


def make_tokenizer(added: list[str | AddedToken] | None = None, **normalizer: bool) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]", "[MASK]"])
    tokenizer.add_tokens(added or [])
    tokenizer.encode_special_tokens = True
    return tokenizer


TOKENIZERS = {
    "uncased": make_tokenizer(),
    "cased": make_tokenizer(lowercase=False),
    "accents": make_tokenizer(strip_accents=False),
    "chinese": make_tokenizer(handle_chinese_chars=False),
    "added": make_tokenizer(
        added=["new", "ver", AddedToken("the-river", single_word=True), AddedToken("é", lstrip=True)]
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(st.one_of(st.lists(st.sampled_from(PARTS)).map("".join), st.text()), max_size=4))
def test_ids_are_those_of_the_whole_texts(name: str, texts: list[str]) -> None:
    """Catches a word that is split where the tokenizer does not, or the reverse, and tokens of another document."""
    tokenizer = TOKENIZERS[name]
    assert encodes_words_independently(tokenizer.to_str())
    cache = WordCache(tokenizer)
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    for _ in range(2):  # the second time all words are known
        found = cache.encode(texts)
        if found is None:
            assert sum(map(len, texts)) > 16 * sum(text.count(" ") for text in texts)
        else:
            assert found == expected


@pytest.mark.parametrize(("limit", "value"), [("_MAX_WORDS", 3), ("_MAX_CHARACTERS", 9)])
def test_a_word_is_tokenized_once(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    """Catches a cache that is not used, and one that grows without a limit, also if its words are long, as sentences in
    Chinese between English text."""
    cache = WordCache(TOKENIZERS["uncased"])
    added: list[list[str]] = []
    add = cache._add
    monkeypatch.setattr(cache, "_add", lambda words: (added.append(sorted(words)), add(words)))
    monkeypatch.setattr(module, limit, value)
    for text in ("the river .", "a river", "the", "the river"):
        expected = TOKENIZERS["uncased"].encode(text, add_special_tokens=False).ids
        assert cache.encode([text, text]) == [expected, expected]
    assert added == [[".", "river", "the"], ["a"], ["the"], ["river"]]


def test_texts_without_spaces_are_not_remembered() -> None:
    """Catches a cache of whole documents, where words are not separated."""
    cache = WordCache(TOKENIZERS["uncased"])
    assert cache.encode(["你好世界" * 10, "the"]) is None
    assert cache.encode(["the river " * 10]) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.BertNormalizer(clean_text=False)),
        lambda tokenizer: setattr(tokenizer, "model", models.BPE()),
        lambda tokenizer: tokenizer.add_tokens(["new york"]),
    ],
)
def test_other_tokenizers_see_whole_texts(change: Callable[[Tokenizer], object]) -> None:
    """Catches a tokenizer whose tokens depend on the spaces, or on the words next to them."""
    tokenizer = make_tokenizer()
    assert json.loads(tokenizer.to_str())["model"]["type"] == "WordPiece"
    change(tokenizer)
    assert not encodes_words_independently(tokenizer.to_str())
