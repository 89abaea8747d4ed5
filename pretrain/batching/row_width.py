"""How wide the rows of windows are.

Sequences of up to L tokens fill rows of L slots badly if most of them are longer than half a row: a paragraph of 1.5 L
tokens becomes two sequences of 0.75 L, each of which needs a row. Wider rows waste fewer slots, but attention, which
compares all slots of a row, takes longer for each slot.
"""

from collections.abc import Iterable
from dataclasses import replace

from pretrain.batching.batch_maker import BatchMaker

_WIDTHS = (1.25, 1.5, 1.75, 2.0)  # that are tried, in units of L
_BUCKET = 16  # widths are a multiple, which suits the kernels
_ATTENTION_TIME = 2.0  # how long a FLOP of attention takes, compared with one of linear layers
_WORTHWHILE = 0.97  # a wider row has to save this much; the estimate is rough
_SEQUENCES = 1024  # that are packed to compare widths


def with_best_row_width(maker: BatchMaker, steps: Iterable[int], attention: float) -> BatchMaker:
    """`maker` with the row width in which its batches take the least time, estimated from some of them.

    All ranks choose the same width, and a resumed run the one that it had.

    Args:
        steps: of the batches to estimate it from, until they have enough sequences.
        attention: FLOPs of attention per slot of a row, relative to those of a slot's linear layers.
    """
    layout = maker.layout
    sample = _sample(maker, steps)
    best, least = maker, _time(maker, sample, attention) * _WORTHWHILE
    for factor in _WIDTHS:
        width = -(-int(factor * layout.width) // _BUCKET) * _BUCKET
        if width <= layout.microbatch_tokens:
            wider = replace(maker, layout=replace(layout, row_width=width))
            if (time := _time(wider, sample, attention)) < least:
                best, least = wider, time
    return best


def _sample(maker: BatchMaker, steps: Iterable[int]) -> list[int]:
    sample, sequences = [], 0
    for step in steps:
        sample.append(step)
        sequences += len(maker.order.batch(step).ids)
        if sequences >= _SEQUENCES:
            break
    return sample


def _time(maker: BatchMaker, steps: Iterable[int], attention: float) -> float:
    """Of computing the batches of these steps; the unit is the time of a slot's linear layers."""
    total = 0.0
    for step in steps:
        *_, assignment = maker.assign(step)
        slots = assignment.microbatches * assignment.rows * assignment.width
        total += slots * (1.0 + _ATTENTION_TIME * attention * assignment.width)
    return total
