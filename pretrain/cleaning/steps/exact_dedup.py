"""Exact deduplication by a hash of the text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from experiment.config import Section
from pretrain.cleaning.arrays import first_of_equal, split_by_part
from pretrain.cleaning.step import Arrays, Document, DuplicateStep, Observed


class Config(Section):
    """Drop documents with the same text as an earlier one."""


class Step(DuplicateStep[Config]):
    config_type = Config

    def observe(self, documents: Sequence[Document]) -> Arrays:
        digests = b"".join(xxhash.xxh3_128_digest(document.text.encode()) for document in documents)
        return {"digests": np.frombuffer(digests, np.uint64).reshape(-1, 2)}

    def decide(self, observed: Observed) -> list[NDArray[Any]]:
        parts = observed("digests")
        digests = np.concatenate([part[:] for part in parts])
        order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: of equal ones, the first comes first
        kept = np.empty(len(order), np.int64)
        kept[order] = order[first_of_equal(digests[order])]
        kept[kept == np.arange(len(order))] = -1
        return split_by_part(kept, list(map(len, parts)))
