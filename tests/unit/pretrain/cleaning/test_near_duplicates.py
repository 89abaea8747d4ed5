"""MinHash: what it finds, what it keeps, and that it never removes what is different."""

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from benchmarks.near_duplicates import measure, plant
from pretrain.cleaning import near_duplicates
from pretrain.cleaning.minhash import NgramSets, choose_bands, jaccard, sketch
from pretrain.cleaning.near_duplicates import choose_duplicates, hash_ngrams


def kept_instead(*texts: str, threshold: float = 0.8, parts: int = 1) -> list[int]:
    bands, hashed = choose_bands(threshold), [hash_ngrams(text, 3) for text in texts]
    sets = [NgramSets.of(list(part)) for part in np.array_split(np.array([*hashed, None], object)[:-1], parts)]
    return choose_duplicates([sketch(part, bands) for part in sets], sets, threshold).tolist()


def test_pairs_above_the_threshold_are_found_and_no_others_removed() -> None:
    """Catches wrong bands or hash functions (recall), and removals by hash alone or along chains (precision)."""
    result = measure(plant(1500, seed=3), 0.8)
    above = result.similarities >= 0.8
    assert above.sum() > 100
    assert result.found[above].mean() >= 0.95
    assert result.of_removed.min() >= 0.8


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_the_threshold_with_few_hashes(threshold: float) -> None:
    """Catches a choice of bands that misses pairs at the threshold, or takes long."""
    bands = choose_bands(threshold)
    assert 1 - (1 - threshold**bands.rows) ** bands.count >= 0.99
    assert bands.rows * bands.count <= 128


def test_texts_without_words_are_compared_as_a_whole() -> None:
    """Catches texts of symbols that are all removed but one."""
    assert kept_instead("⚀ ⚁", "!!!", "⚀ ⚁", "…") == [-1, -1, 0, -1]


@pytest.mark.parametrize("line_end", ["\n", ""])
def test_a_large_document_takes_little_memory(line_end: str) -> None:
    """Catches gigabytes for the words and n-grams of a collection in Chinese that is one document, or one line."""
    lines = ["".join(chr(0x4E00 + (line * 100 + place) * 31 % 20_000) for place in range(100)) for line in range(2000)]
    text = line_end.join(lines)
    text_length = len(text)  # assertions show values
    tracemalloc.start()
    try:
        found = hash_ngrams(text, 5)
        assert tracemalloc.get_traced_memory()[1] < 60 * text_length
    finally:
        tracemalloc.stop()
    assert len(found) > 10_000


def test_similarity_is_not_passed_on_along_a_chain() -> None:
    """Catches connected components: the last text is similar to the one before it only, which is removed."""
    words = [f"w{number}" for number in range(140)]
    chain = [" ".join(words[start : start + 100]) for start in (0, 10, 20)]
    assert kept_instead(*chain, threshold=0.75) == [-1, 0, -1]


def test_documents_similar_to_a_dropped_one_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches near-duplicates that are kept because the document that both were compared with is dropped, and pages of
    one template that are all compared with each other."""
    calls, count = list[None](), 200
    monkeypatch.setattr(near_duplicates, "jaccard", lambda *given: calls.append(None) or jaccard(*given))
    pages = [np.array([*range(20), *range(100 * page, 100 * page + 4)], np.uint32) for page in range(1, count + 1)]
    ngrams = [np.arange(16, dtype=np.uint32), np.arange(20, dtype=np.uint32), *pages, pages[0][:-1]]
    keys = np.array([[0, *range(len(ngrams) - 1)], [1, *[0] * (len(ngrams) - 1)]], np.uint64)
    assert choose_duplicates([keys], [NgramSets.of(ngrams)], 0.8).tolist() == [-1, 0, *[-1] * count, 2]
    assert len(calls) < 40 * count


def test_the_first_of_duplicates_is_kept_in_any_division_into_parts() -> None:
    """Catches an index that counts from the beginning of a part."""
    first, second = "one two three four five six", "seven eight nine ten eleven twelve"
    texts = [first, second, "other words that nobody has written", first.upper(), second + "!", first]
    assert kept_instead(*texts) == kept_instead(*texts, parts=3) == [-1, -1, -1, 0, 1, 0]


def test_few_sets_are_read() -> None:
    """Catches two files that are opened for each pair of documents, also for those whose sizes differ too much, and
    again for the document that all others are compared with."""
    read = list[slice]()

    class Stored:
        def __getitem__(self, rows: slice) -> Any:
            read.append(rows)
            return np.arange(rows.stop - rows.start, dtype=np.uint32)

    stored: Any = Stored()
    sets = [NgramSets(stored, np.array([10, 20])), NgramSets(stored, np.array([100, 110]))]
    assert choose_duplicates([np.zeros((1, 4), np.uint64)], sets, 0.8).tolist() == [-1, 0, -1, 0]
    assert len(read) == 3


def test_known_pairs_are_not_searched_again_in_each_band() -> None:
    """Catches pages of one template that are compared for hours: many pairs, few of which are new in a band; and a
    search that is fast because it finds nothing."""
    count, bands = 1000, 1000
    ngrams = [np.arange(1 + 9 * (number % 2), dtype=np.uint32) + 10 * number for number in range(count)]
    ngrams[-1] = ngrams[501]
    sets = NgramSets.of(ngrams)
    keys = np.tile(np.arange(count, dtype=np.uint64), (bands, 1))
    keys[0] = 0
    keys[range(1, bands), range(bands - 1)] = count - 1
    started = time.process_time()
    assert choose_duplicates([keys], [sets], 0.8).tolist() == [-1] * (count - 1) + [501]
    assert time.process_time() - started < 3


def test_numbers_make_a_difference() -> None:
    """Catches a normalization under which tables and lists of numbers are all the same."""
    assert kept_instead("1 2 3 4 5 6", "7 8 9 10 11 12") == [-1, -1]
