"""Which examples form a batch: examples of similar length, so that there is little padding."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

_SORTED_BATCHES = 50  # examples of this many batches are sorted by length together: less padding, still random


def training_order(
    lengths: Sequence[int], batch_size: int, seed: int, first: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """The epoch (from 1) and the examples of each update from number `first` on, without end.

    A pure function of the seed and the number of the update.
    """
    epoch, position = divmod(first, -(-len(lengths) // batch_size))
    for number in itertools.count(epoch + 1):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        for indices in training_batches(lengths, batch_size, generator)[position:]:
            yield number, indices
        position = 0


def training_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """The examples of one epoch by index: each once, in shuffled batches of similar length.

    If the last batch is smaller than the others, its examples are drawn at random like theirs.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(shuffled) - len(shuffled) % batch_size
    group = batch_size * _SORTED_BATCHES
    batches = [shuffled[whole:]] if shuffled[whole:] else []
    for start in range(0, whole, group):
        by_length = sorted(shuffled[start : min(start + group, whole)], key=lambda index: lengths[index])
        batches += [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All examples by index, in batches of similar length. The longest come first, to run out of memory early if at
    all."""
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
