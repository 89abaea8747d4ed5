"""Near-deduplication by MinHash, see `pretrain.cleaning.minhash` and `near_duplicates`."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, cast

from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from experiment.config import Section
from pretrain.cleaning.arrays import split_by_part
from pretrain.cleaning.minhash import Bands, NgramSets, choose_bands, sketch
from pretrain.cleaning.near_duplicates import choose_duplicates, hash_ngrams
from pretrain.cleaning.step import Arrays, Document, DuplicateStep, Observed


class Config(Section):
    """Drop documents that share most of their n-grams with an earlier one that is kept."""

    threshold: Annotated[float, Field(ge=0.3, le=1.0)] = 0.8
    """Drop documents with at least this Jaccard similarity of the sets of n-grams."""

    ngram: PositiveInt = 5
    """Words of an n-gram; characters in scripts without spaces."""


class Step(DuplicateStep[Config]):
    config_type = Config

    @cached_property
    def bands(self) -> Bands:
        return choose_bands(self.config.threshold)

    def observe(self, documents: Sequence[Document]) -> Arrays:
        sets = NgramSets.of([hash_ngrams(document.text, self.config.ngram) for document in documents])
        return {"bands": sketch(sets, self.bands), "ngrams": sets.ngrams, "ends": sets.ends}

    def decide(self, observed: Observed) -> list[NDArray[Any]]:
        parts = zip(observed("ngrams"), observed("ends"), strict=True)
        # The n-grams stay on disk: like an array, they are read by slices.
        sets = [NgramSets(cast(NDArray[Any], ngrams), ends[:]) for ngrams, ends in parts]
        kept = choose_duplicates(observed("bands"), sets, self.config.threshold)
        return split_by_part(kept, [len(part.ends) for part in sets])
