"""Draw the documents of a held-out corpus, and limit how many the main corpus gets."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from experiment.errors import UserError

Part = Literal["main", "heldout"]
MAIN: Part = "main"
HELDOUT: Part = "heldout"


@dataclass(frozen=True)
class Sampling:
    """Draws by seed: `holdout` of all documents for the held-out corpus, `limit` of the rest for the main corpus."""

    seed: int
    limit: int | None
    holdout: int | None

    @property
    def enabled(self) -> bool:
        """Whether anything is drawn, which needs the number of documents in advance."""
        return self.limit is not None or self.holdout is not None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The corpora that are built."""
        return (MAIN, HELDOUT) if self.holdout else (MAIN,)

    def assign(self, documents: int) -> Iterator[Part | None]:
        """Assign each of `documents` in turn to a part, or to None. Raises UserError if there are too few.

        Selection sampling (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S): exact counts, constant
        memory, source order. The held-out documents do not depend on the limit.
        """
        holdout = self.holdout or 0
        if holdout >= documents:
            raise UserError(f"--holdout {holdout}: the source has only {documents} documents with text")
        rest = documents - holdout
        limit = rest if self.limit is None else min(self.limit, rest)
        return self._select(documents, holdout, rest, limit)

    def _select(self, documents: int, holdout: int, rest: int, limit: int) -> Iterator[Part | None]:
        holdout_random, limit_random = random.Random(f"holdout {self.seed}"), random.Random(f"limit {self.seed}")
        for left in range(documents, 0, -1):
            if holdout_random.random() * left < holdout:
                holdout -= 1
                yield HELDOUT
            elif limit_random.random() * rest < limit:
                rest, limit = rest - 1, limit - 1
                yield MAIN
            else:
                rest -= 1
                yield None
