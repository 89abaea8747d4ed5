"""Windows over texts that are too long for one sequence."""

from collections.abc import Sequence


def windows(length: int, size: int) -> list[range]:
    """Windows of `size` positions that cover `length` positions, each overlapping the next by a third or more."""
    if length <= size:
        return [range(length)]
    step = max(size - size // 3, 1)
    return [range(start, start + size) for start in (*range(0, length - size, step), length - size)]


def window_around(position: int, length: int, size: int) -> range:
    """At most `size` of `length` positions, with the middle at `position` or as near as the ends allow."""
    start = max(min(position - size // 2, length - size), 0)
    return range(start, min(start + size, length))


def most_context(found: Sequence[range], position: int) -> int:
    """Which of the windows shows most of what surrounds a position: the one whose nearer end is farthest."""

    def margin(window: range) -> int:
        return min(position - window.start, window.stop - 1 - position)

    return max(range(len(found)), key=lambda index: margin(found[index]))
