"""Windows over texts that are too long for one sequence, and what a sequence shows around a blank."""

from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

Context = Literal["article", "around", "between"]


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


class Surroundings(NamedTuple):
    """The tokens before and after a blank."""

    left: list[int]
    right: list[int]
    cut: int  # tokens that are left out


def surroundings(
    segments: Sequence[list[int]], fillings: Sequence[list[int]], blank: int, context: Context, size: int
) -> list[Surroundings]:
    """What is shown around a blank, once for each sequence that shows it. At most `size` tokens each.

    segments: the tokens between the blanks of an article, one list more than blanks. fillings: the tokens in each
    blank; that of `blank` itself does not count. context: "article" gives all windows over the article that show
    tokens on both sides of the blank, "around" one that is cut around it, "between" what is between the neighbouring
    blanks.
    """
    before, after = segments[blank], segments[blank + 1]
    if context != "between":
        parts = [part for pair in zip(segments, fillings, strict=False) for part in pair]
        before = list(chain(*parts[: 2 * blank + 1]))
        after = list(chain(*parts[2 * blank + 2 :], segments[-1]))
    position, length = len(before), len(before) + len(after)
    if context == "article":
        shown = [window for window in windows(length, size) if _shows(window, position, length)]
    else:
        shown = [window_around(position, length, size)]
    cut = 0 if context == "article" else length - len(shown[0])
    return [Surroundings(before[window.start :], after[: window.stop - position], cut) for window in shown]


def _shows(window: range, position: int, length: int) -> bool:
    """Whether a window shows tokens before and after a position, if there are any."""
    return (window.start < position or window.start == 0) and (window.stop > position or window.stop == length)
