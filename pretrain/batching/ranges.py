"""Many half-open index ranges at once."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranges(NamedTuple):
    """R ranges [start, start + size) of tokens, words or slots."""

    starts: NDArray[np.int64]  # [R]
    sizes: NDArray[np.int64]  # [R]

    def indices(self) -> NDArray[np.int64]:
        """The indices of every range, concatenated; shape [sum of sizes]."""
        before = np.cumsum(self.sizes) - self.sizes
        indices: NDArray[np.int64] = np.arange(self.sizes.sum()) + np.repeat(self.starts - before, self.sizes)
        return indices
