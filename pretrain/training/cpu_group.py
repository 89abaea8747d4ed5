"""Collectives over all ranks on the CPU: whole numbers and small objects, never through the device."""

import datetime
import os
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from experiment.errors import HostError, UserError, readable_disk_errors
from experiment.process.daemon_thread import in_daemon_thread
from experiment.process.own_process import variable_set
from pretrain.world import World

T = TypeVar("T")

_POLL_SECONDS = 1.0
_CONNECT_ON_USE = "TORCH_GLOO_LAZY_INIT"


class AgreedError(UserError):
    """A UserError that every rank raises at the same point."""


class CpuGroup:
    """A gloo group of all ranks."""

    def __init__(
        self, world: World, timeout: datetime.timedelta, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Collective.

        Args:
            world: of the process group.
            timeout: of every collective of the group.
            on_progress: called after each collective.
        """
        self.world = world
        self._on_progress = on_progress
        self._timeout_seconds = timeout.total_seconds()
        self._group = None  # the default one
        if dist.get_backend() != "gloo":
            # Two ranks connect when they first send to each other: to neighbours in a ring and in trees, not to all.
            with variable_set(_CONNECT_ON_USE, os.environ.get(_CONNECT_ON_USE, "1")):
                self._group = dist.new_group(backend="gloo", timeout=timeout)

    def all_reduce_sum(self, numbers: Sequence[int], is_progress: bool = True) -> list[int]:
        """Return the sum of each number over all ranks. Collective. is_progress: of this rank."""
        return self.start_all_reduce_sum(numbers, is_progress)()

    def start_all_reduce_sum(self, numbers: Sequence[int], is_progress: bool = True) -> Callable[[], list[int]]:
        """Like `all_reduce_sum`, while this rank does other work. Returns a function that waits for the sums."""
        sums = torch.tensor(numbers, dtype=torch.int64)
        work = dist.all_reduce(sums, group=self._group, async_op=True)

        def wait_for_sums() -> list[int]:
            work.wait()
            if is_progress:
                self._on_progress()
            return sums.tolist()

        return wait_for_sums

    def wait_for_all(self, part: "Future[Any]", made_progress: Callable[[], bool]) -> None:
        """Wait until `part` has ended on all ranks, however long that takes. Collective.

        The ranks poll every second. Waiting for others is progress of a rank whose part has ended. Any other makes
        progress only if `made_progress()` since the last poll. Raises TimeoutError on all ranks, naming the first one
        that has made none for the timeout of the group. Polls are counted, so that a suspended job does not time out.
        """
        idle_polls, ranks_done = 0, 0
        while ranks_done < self.world.size:
            wait([part], timeout=_POLL_SECONDS)
            is_done = part.done()
            is_idle = not is_done and not made_progress()
            idle_polls = idle_polls + 1 if is_idle else 0
            is_stuck = idle_polls * _POLL_SECONDS > self._timeout_seconds
            ranks_done, ranks_stuck = self.all_reduce_sum([int(is_done), int(is_stuck)], is_progress=not is_idle)
            if ranks_stuck:
                problem = f"no progress for {self._timeout_seconds:.0f} s" if is_stuck else None
                raise TimeoutError(self.first_message(problem, always_name_rank=True))

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the picklable value of every rank, by rank. Collective."""
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, value, group=self._group)
        self._on_progress()
        return gathered

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank and return its result. A UserError, or an error of the disk, on any rank is an
        AgreedError on all, but a HostError stays one of its rank, whose end the others notice.

        `function` may call `from_rank0` and `from_all_ranks_slowly`, the same number of times on each rank, but no
        other collective: there the other ranks learn of a rank that has failed.
        """
        result, problem = _call(function)
        self._raise_any(problem)
        return result

    def from_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on all ranks. Errors are raised on all as by `call`."""
        self._raise_any(None)
        box: list[Any] = list(_call(function)) if self.world.rank == 0 else [None, None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        self._on_progress()
        if box[1] is not None:
            raise AgreedError(box[1])
        result: T = box[0]
        return result

    def from_all_ranks_slowly(self, function: Callable[[Callable[[], None]], T]) -> list[T]:
        """Call `function` on every rank and return the results, by rank. Errors are raised on all as by `call`.

        `function` may take longer than the timeout of a collective. It gets a callback for its progress, see
        `wait_for_all`.
        """
        self._raise_any(None)
        progressed = threading.Event()
        part = in_daemon_thread(lambda: function(progressed.set), "slow part")

        def made_progress() -> bool:
            made = progressed.is_set()
            progressed.clear()
            return made

        self.wait_for_all(part, made_progress)
        gathered = self.all_gather_objects(_call(part.result))
        if problem := next((text for _, text in gathered if text is not None), None):
            raise AgreedError(problem)
        return [of_rank for of_rank, _ in gathered]

    def first_message(self, message: str | None, always_name_rank: bool = False) -> str | None:
        """Return the message of the first rank that has one, with its host and rank unless all have one; None if none
        has. Collective. `always_name_rank`: also if all have one."""
        gathered = self.all_gather_objects((platform.node(), message))
        found = [(rank, host, text) for rank, (host, text) in enumerate(gathered) if text is not None]
        if not found:
            return None
        rank, host, text = found[0]
        if len(found) == len(gathered) and not always_name_rank:
            return str(text)
        return f"{host}, rank {rank}: {text}"

    def _raise_any(self, message: str | None) -> None:
        """Raise AgreedError on all ranks if one of them has a message. Collective."""
        if (text := self.first_message(message)) is not None:
            raise AgreedError(text)

    def barrier(self) -> None:
        dist.barrier(group=self._group)


def _call(function: Callable[[], T]) -> tuple[T, None] | tuple[Any, str]:
    """Return (result, None), or (None, message) of a UserError or an error of the disk. Raises a HostError, and an
    AgreedError, of which the other ranks know."""
    try:
        with readable_disk_errors():
            return function(), None
    except (AgreedError, HostError):
        raise
    except UserError as error:
        return None, str(error)
