"""Recall and precision of `minhash` by similarity, on documents with planted near-duplicates, against brute force.

    python -m benchmarks.near_duplicates [--documents 20000] [--threshold 0.8]

Documents of 60 to 140 random words; 30 % of them are copies of another one with new words at the end, such that the
Jaccard similarity of their 5-grams is between 0.5 and 1. Brute force counts the common 5-grams of all pairs. A pair is
found if one of the two is removed. A removal is wrong if no document that is kept has the threshold.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import fire
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.measuring import describe_machine
from pretrain.cleaning.minhash import NgramSets, choose_bands, sketch
from pretrain.cleaning.near_duplicates import choose_duplicates, hash_ngrams

_NGRAM = 5
_VOCABULARY = 20_000
_COPIES = 0.3


@dataclass(frozen=True)
class Result:
    similarities: NDArray[np.float64]  # of all pairs of at least 0.3, by brute force
    found: NDArray[np.bool_]  # of each pair, whether one of the two is removed
    of_removed: NDArray[np.float64]  # similarity of each removed document to the most similar one that is kept


def plant(documents: int, seed: int) -> list[str]:
    """Documents with near-duplicates, in random order."""
    generator = random.Random(seed)
    originals = [_words(generator, generator.randint(60, 140)) for _ in range(round(documents * (1 - _COPIES)))]
    texts = [" ".join(words) for words in originals]
    for _ in range(documents - len(texts)):
        words, similarity = generator.choice(originals), generator.uniform(0.5, 1.0)
        # Two sets of n n-grams have the similarity k / (2n - k) if they share k.
        shared = round(2 * (len(words) - _NGRAM + 1) * similarity / (1 + similarity)) + _NGRAM - 1
        texts.append(" ".join([*words[:shared], *_words(generator, len(words) - shared)]))
    generator.shuffle(texts)
    return texts


def _words(generator: random.Random, count: int) -> list[str]:
    return [f"w{generator.randrange(_VOCABULARY)}" for _ in range(count)]


def measure(texts: Sequence[str], threshold: float) -> Result:
    """Deduplicate documents and compare with brute force."""
    sets = NgramSets.of([hash_ngrams(text, _NGRAM) for text in texts])
    kept_instead = choose_duplicates([sketch(sets, choose_bands(threshold))], [sets], threshold)
    is_removed = kept_instead >= 0
    left, right, similarities = _brute_force(sets)
    found = is_removed[left] | is_removed[right]
    best = np.zeros(len(texts))
    for removed, other in ((left, right), (right, left)):
        with_kept = is_removed[removed] & ~is_removed[other]
        np.maximum.at(best, removed[with_kept], similarities[with_kept])
    return Result(similarities, found, best[is_removed])


def _brute_force(sets: NgramSets) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
    """Return all pairs of documents with a similarity of at least 0.3, and their similarities."""
    _, columns = np.unique(sets.ngrams, return_inverse=True)
    sizes = np.diff(sets.ends, prepend=0)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    matrix = sparse.csr_matrix((np.ones(len(columns), np.int32), (rows, columns)))
    shared = sparse.triu(matrix @ matrix.T, 1).tocoo()
    similarities = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    near = similarities >= 0.3
    return shared.row[near], shared.col[near], similarities[near]


def near_duplicates(*, documents: int = 20_000, threshold: float = 0.8, seed: int = 0) -> None:
    """Measure and print a table."""
    print(describe_machine())
    texts, started = plant(documents, seed), time.process_time()
    result = measure(texts, threshold)
    bands = choose_bands(threshold)
    print(f"{len(texts):,} documents, threshold {threshold}, {bands.count} bands of {bands.rows} rows")
    print(f"{time.process_time() - started:.1f} s of CPU, brute force included")
    print("| similarity | pairs | found |\n|---|---:|---:|")
    for low in np.arange(0.5, 1.0, 0.05):
        inside = (result.similarities >= low) & (result.similarities < low + 0.05 + (low > 0.94))
        share = f"{result.found[inside].mean():.4f}" if inside.any() else "–"
        print(f"| {low:.2f} to {low + 0.05:.2f} | {inside.sum():,} | {share} |")
    above = result.similarities >= threshold
    print(f"recall at or above the threshold: {result.found[above].mean():.4f}")
    print(f"removed: {len(result.of_removed):,}; the least similar to a kept document: {result.of_removed.min():.4f}")


if __name__ == "__main__":
    fire.Fire(near_duplicates)
