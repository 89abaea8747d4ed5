"""What the ranks agree on once a step: whole numbers, over the network of the hosts, never through the device."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from experiment.errors import UserError

T = TypeVar("T")


class HostGroup:
    def __init__(self, timeout: datetime.timedelta) -> None:
        """Collective: all ranks at once. `timeout`: how long one rank waits for the others."""
        on_host = dist.get_backend() == "gloo"
        self._group = None if on_host else dist.new_group(backend="gloo", timeout=timeout)

    def totals(self, counts: Sequence[int]) -> list[int]:
        """The sum of each number over all ranks."""
        summed = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(summed, group=self._group)
        return [int(total) for total in summed]

    def gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, by rank."""
        own = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, own, group=self._group)
        return [of_rank.tolist() for of_rank in found]

    def of_rank_0(self, find: Callable[[], T]) -> T:
        """What `find` gives on rank 0, on all ranks; a UserError there is raised on all of them."""
        box: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                box[0] = find()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise UserError(box[1])
        found: T = box[0]
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        dist.barrier(group=self._group)
