"""Curves of any length in bounded memory, and their moving averages.

Points are kept in buckets of consecutive ones, each with its first, lowest, highest and last point: the aggregation M4
of Jugel et al. (2014), "M4: A Visualization-Oriented Time Series Data Aggregation", with which a line that is drawn at
one bucket per pixel has the pixels of the whole curve. No outlier is lost, and buckets can be merged, so points can be
added at the end forever.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 2000  # that are shown of a curve

_MAX_BUCKETS = MAX_POINTS // 4
_FIRST, _LOW, _HIGH, _LAST = (slice(at, at + 2) for at in range(0, 8, 2))  # columns of a bucket: x and y
_SUMS = slice(8, 10)  # of y, and the number of points
_WINDOW = 10  # a moving average covers a tenth of a curve

Values = Sequence[float] | NDArray[np.float64]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y."""


class Curve:
    """Points in the order of their x, without those whose y is NaN or infinite. It depends on the points alone, not on
    how many were added at a time."""

    def __init__(self) -> None:
        # Full buckets of `_size` points each, and the points after them. Replaced together: another thread may read.
        self._state = np.empty((0, 10)), np.empty((0, 10)), 1

    @classmethod
    def of(cls, x: Values, y: Values) -> Self:
        curve = cls()
        curve.extend(x, y)
        return curve

    def extend(self, x: Values, y: Values) -> None:
        points = np.array([x, y], dtype=np.float64).T
        points = points[np.isfinite(points[:, 1])]
        new = np.hstack([np.tile(points, 4), points[:, 1:], np.ones((len(points), 1))])
        full, rest, size = self._state
        while len(new):
            room = (_MAX_BUCKETS - len(full)) * size - len(rest)
            rest, new = np.concatenate([rest, new[:room]]), new[room:]
            end = len(rest) // size * size
            full, rest = np.concatenate([full, _merged(rest[:end], size)]), rest[end:]
            if len(full) == _MAX_BUCKETS:
                full, size = _merged(full, 2), 2 * size
        self._state = full, rest, size

    def __len__(self) -> int:
        """Return the number of points that were added."""
        full, rest, size = self._state
        return len(full) * size + len(rest)

    def points(self, limit: int = MAX_POINTS) -> Points:
        """Return the first, lowest, highest and last point of each bucket, at most `limit`: all of a short curve."""
        corners = self._buckets(limit)[:, :8].reshape(-1, 4, 2)
        by_x = np.take_along_axis(corners, corners[:, :, :1].argsort(axis=1, kind="stable"), axis=1).reshape(-1, 2)
        kept = np.ones(len(by_x), dtype=np.bool_)
        kept[1:] = (by_x[1:] != by_x[:-1]).any(axis=1)
        return by_x[kept, 0], by_x[kept, 1]

    def average(self, limit: int = MAX_POINTS) -> Points:
        """Return the moving average of all points, one value per bucket.

        Near the start the window is symmetric, so that the average follows a loss that falls fast. Near the end it is
        not: it keeps all buckets on the left, so that the curve does not end in the noise of a single value.
        """
        buckets = self._buckets(limit)
        radius, index = len(buckets) // (2 * _WINDOW), np.arange(len(buckets))
        near = np.minimum(radius, index)
        first, end = index - near, np.minimum(index + near + 1, len(buckets))
        # Each window on its own: in the differences of a cumulative sum, the rounding of one huge value would stay.
        padded = np.concatenate([buckets[:, _SUMS], np.zeros((1, 2))])
        total, count = np.add.reduceat(padded, np.stack([first, end], axis=1).ravel())[::2].T
        return (buckets[:, 0] + buckets[:, 6]) / 2, total / count

    @property
    def ends(self) -> Points:
        """The last point of each bucket."""
        return tuple(self._buckets(MAX_POINTS)[:, _LAST].T)

    @property
    def lowest(self) -> tuple[float, float]:
        """(x, y) of the lowest point. Raises ValueError without points, as the properties below do."""
        return self._point(_LOW, int(self._buckets(MAX_POINTS)[:, _LOW][:, 1].argmin()))

    @property
    def highest(self) -> tuple[float, float]:
        return self._point(_HIGH, int(self._buckets(MAX_POINTS)[:, _HIGH][:, 1].argmax()))

    @property
    def last(self) -> tuple[float, float]:
        return self._point(_LAST, -1)

    @property
    def means(self) -> NDArray[np.float64]:
        """The mean y of each bucket: all values of a short curve."""
        totals, counts = self._buckets(MAX_POINTS)[:, _SUMS].T
        return np.asarray(totals / counts)

    def _point(self, columns: slice, row: int) -> tuple[float, float]:
        x, y = self._buckets(MAX_POINTS)[row, columns].tolist()
        return x, y

    def _buckets(self, limit: int) -> NDArray[np.float64]:
        """Return the buckets, [B, 10], merged until their points are at most `limit`."""
        full, rest, size = self._state
        buckets = np.concatenate([full, _merged(rest, len(rest))])
        group = 1
        while len(full) * size + len(rest) > limit and 4 * -(-len(buckets) // group) > limit:
            group *= 2
        end = len(buckets) // group * group
        return np.concatenate([_merged(buckets[:end], group), _merged(buckets[end:], len(buckets) - end)])


def _merged(buckets: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Merge each `size` consecutive buckets into one."""
    if len(buckets) == 0 or size == 1:
        return buckets
    groups = buckets.reshape(-1, size, 10)
    each = np.arange(len(groups))
    low, high = groups[:, :, 3].argmin(axis=1), groups[:, :, 5].argmax(axis=1)
    points = groups[:, 0, _FIRST], groups[each, low, _LOW], groups[each, high, _HIGH], groups[:, -1, _LAST]
    return np.hstack([*points, groups[:, :, _SUMS].sum(axis=1)])
