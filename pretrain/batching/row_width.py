"""The width of packed rows.

Sequences of up to L tokens fill rows of L slots badly if most of them are longer than half a row: a paragraph of 1.5 L
tokens becomes two sequences of 0.75 L, each of which needs a row. Wider rows waste fewer slots, but attention, which
compares all slots of a row, takes longer for each slot.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pretrain.batching.batch_maker import BatchMaker
from pretrain.batching.packing import MicrobatchLayout, assign, next_multiple

_WIDTHS = (1.25, 1.5, 1.75, 2.0)  # that are tried, in units of L
_BUCKET = 16  # widths are a multiple, which suits the kernels
# How long a FLOP of attention takes, compared with one of linear layers: 1.5 to 2.5 on a CPU
# (benchmarks/RESULTS.md, "Experiments"). As that is uncertain, wider rows must take less than this share of the time.
_ATTENTION_TIME = 2.0
_WORTHWHILE = 0.97
_BATCHES, _SEQUENCES = 16, 1024  # to compare widths, batches are packed until either number is reached


def with_best_row_width(maker: BatchMaker, steps: range, warmup_steps: int, attention_ratio: float) -> BatchMaker:
    """Return `maker` with the row width in which its batches take the least time, estimated from some of them.

    All ranks choose the same width, and a resumed run the one that it had.

    Args:
        steps: of the stage.
        warmup_steps: of the run, in which batches grow; the width is that for full batches.
        attention_ratio: as `FlopsModel.attention_ratio`.
    """
    layout, ranks = maker.layout, maker.world.size
    sample = _sample(maker, max(steps.start, min(warmup_steps, steps.stop - _BATCHES)), steps.stop)
    best, least = layout, _time(sample, ranks, layout, attention_ratio) * _WORTHWHILE
    for factor in _WIDTHS:
        width = next_multiple(int(factor * layout.max_seq_length), _BUCKET)
        if width <= layout.microbatch_tokens:
            wider = replace(layout, wide_rows=width)
            if (time := _time(sample, ranks, wider, attention_ratio)) < least:
                best, least = wider, time
    return replace(maker, layout=best)


def _sample(maker: BatchMaker, first: int, end: int) -> list[NDArray[np.int64]]:
    """Return the lengths of the sequences of some batches, special tokens included."""
    sample, sequences = [], 0
    for step in range(first, min(first + _BATCHES, end)):
        _, text_lengths, _ = maker.assign(step)
        sample.append(text_lengths + maker.vocabulary.num_special_tokens)
        sequences += len(text_lengths)
        if sequences >= _SEQUENCES:
            break
    return sample


def _time(sample: list[NDArray[np.int64]], ranks: int, layout: MicrobatchLayout, attention_ratio: float) -> float:
    """Estimate the time of computing batches, in units of the time of a slot's linear layers."""
    slots = sum(int(assign(lengths, ranks, layout).bounds[-1]) for lengths in sample)
    return slots * (1.0 + _ATTENTION_TIME * attention_ratio * layout.row_width)
