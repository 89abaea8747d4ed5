"""Words of texts in many scripts."""

import time

import pytest

from pretrain.cleaning import words as module
from pretrain.cleaning.words import count_words, divided_words, normalized_words, sentences, tokens, word_spans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I love this ❤\ufe0f movie", ["i", "love", "this", "movie"]),
        ("She _ went __home__", ["she", "went", "home"]),
        ("co\u00adop naïve cafe\u0301 x’s", ["coop", "naive", "cafe", "x's"]),
        ("ｶﾞ ガ", ["カ", "カ"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("花呗可以", ["花", "呗", "可", "以"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("कि का", ["कि", "का"]),
        ("\u0301 \ufe0f \uff9e _", []),
    ],
)
def test_words_are_those_that_a_reader_sees(text: str, expected: list[str]) -> None:
    """Catches invisible characters and underscores that are words or keep equal ones apart, and empty words."""
    assert normalized_words(text) == expected
    divided = [part for word in expected for part in word.split("'")]
    assert [normalized_words(text[start:end]) for start, end in word_spans(text)] == [[word] for word in divided]


def test_contractions_are_divided_in_any_spelling() -> None:
    """Catches evaluation texts that are not found, because they are tokenized as in the Penn Treebank."""
    texts = ["It's 'n'thing' she CAN'T", "it 's ' n ' thing ' she ca n't", "It`s ‘n’thing´ she can\x92t"]
    assert [divided_words(text) for text in texts] == [["it", "s", "n", "thing", "she", "ca", "n't"]] * 3


def test_a_contraction_ends_before_chinese() -> None:
    """Catches an evaluation text that is not found, because no space follows its contraction."""
    assert divided_words("don't你") == divided_words("do n't你") == ["do", "n't", "你"]
    assert divided_words("n'tя n't1") == ["n", "tя", "n", "t1"]


def test_long_words_are_not_remembered() -> None:
    """Catches a cache that takes gigabytes for text with long numbers or sequences."""
    module._cached_plain.cache_clear()
    assert normalized_words("É" * 65) == divided_words("É" * 65) == ["e" * 65]
    assert normalized_words("É" * 64) == ["e" * 64]
    assert module._cached_plain.cache_info().currsize == 1


def test_two_characters_of_a_script_without_spaces_are_a_word() -> None:
    """Catches five Chinese characters that count as five words."""
    assert count_words(normalized_words("花呗分期 by phone")) == 4
    assert count_words(normalized_words("สวัสดี")) == 2


def test_tokens_lose_no_visible_character() -> None:
    """Catches punctuation, underscores or emoji that are in neither words nor runs of punctuation."""
    assert tokens("so_ she ❤\ufe0f, 好") == ["so", "_", "she", "❤\ufe0f,", "好"]


def test_sentences_end_after_closing_quotes() -> None:
    """Catches a quote that begins the next sentence, half-width marks that end none in Chinese, and a time that grows
    with the square of a row of brackets."""
    assert sentences('He said "no." ("Yes!") 好。是 x') == ['He said "no."', '("Yes!")', "好。", "是 x"]
    quoted = ["「走吧！？」", "他（笑。）", "《终。》", "“是。”", "走!", "真？!", "「吗?」", "我…他3.5万。", "x"]
    assert sentences("".join(quoted)) == quoted
    started = time.process_time()
    for row in (")" * 20_000, "」" * 20_000, "!" * 20_000):
        assert sentences(row) == [row]
    assert time.process_time() - started < 1
