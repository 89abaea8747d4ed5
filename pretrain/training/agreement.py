"""What the ranks have to agree on once a step: whole numbers, over the network of the hosts, never through the device."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from pretrain.training.engine import COLLECTIVE_TIMEOUT

T = TypeVar("T")


class Agreement:
    def __init__(self) -> None:
        """Collective: all ranks at once."""
        on_host = dist.get_backend() == "gloo"
        self._group = None if on_host else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def totals(self, counts: Sequence[int]) -> list[int]:
        """The sum of each number over all ranks."""
        summed = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(summed, group=self._group)
        return [int(total) for total in summed]

    def of_rank_0(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def wait(self) -> None:
        """Until every rank is here."""
        dist.barrier(group=self._group)
