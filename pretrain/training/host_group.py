"""Collectives between the ranks' host processes: whole numbers and small objects, never through the device."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from experiment.errors import UserError

T = TypeVar("T")


class HostGroup:
    """A gloo group of all ranks."""

    def __init__(self, timeout: datetime.timedelta) -> None:
        """Collective. `timeout`: of every collective of the group."""
        on_host = dist.get_backend() == "gloo"
        self._group = None if on_host else dist.new_group(backend="gloo", timeout=timeout)

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """The sum of each number over all ranks."""
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums, group=self._group)
        return [int(total) for total in sums]

    def all_gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, by rank."""
        own = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, own, group=self._group)
        return [of_rank.tolist() for of_rank in gathered]

    def from_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on all ranks. A UserError is raised on all of them."""
        box: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise UserError(box[1])
        result: T = box[0]
        return result

    def barrier(self) -> None:
        dist.barrier(group=self._group)
