"""Dynamic batching: items of all requests that wait are computed together. Pure asyncio, without a model.

While a batch is computed, others wait and form the next one. Requests take turns in giving items to a batch, so a small
one is not behind all of a large one.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Size:
    """The cost of an item, or of a batch."""

    sequences: int
    longest: int  # tokens of its longest sequence

    @property
    def tokens(self) -> int:
        """The computed tokens, padding included."""
        return self.sequences * self.longest


@dataclass(frozen=True)
class BatchLimits:
    """Limits at which a batch is complete."""

    tokens: int  # with padding; a single item may have more
    delay: float  # seconds that the first item waits for others
    padding: int  # tokens of padding that cost about as much as another batch


def plan_batches(sizes: Sequence[Size], limits: BatchLimits) -> list[list[int]]:
    """Batch all items, by index, with others of similar length, the longest first.

    A batch ends at the limit of tokens, or where its padding would cost more than another batch.
    """
    batches: list[list[int]] = []
    sequences = longest = padding = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index].longest):
        size = sizes[index]
        more = size.sequences * (longest - size.longest)
        fits = (sequences + size.sequences) * longest <= limits.tokens and padding + more <= limits.padding
        if batches and fits:
            batches[-1].append(index)
            sequences, padding = sequences + size.sequences, padding + more
        else:
            batches.append([index])
            sequences, longest, padding = size.sequences, size.longest, 0
    return batches


@dataclass(eq=False)
class _Job(Generic[ItemT, ResultT]):
    """The items of one request."""

    items: Sequence[ItemT]
    sizes: Sequence[Size]
    arrived: float  # by the clock of the event loop
    done: asyncio.Future[None]
    waiting: deque[int] = field(default_factory=deque)  # items that are in no batch yet, by index
    results: dict[int, ResultT] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        self.waiting.clear()
        if not self.done.done():
            self.done.set_exception(error)

    def put(self, index: int, result: ResultT) -> None:
        self.results[index] = result
        if len(self.results) == len(self.items) and not self.done.done():
            self.done.set_result(None)


_Part = tuple[_Job[ItemT, ResultT], int]
"""An item: its job, and its index there."""


class Batcher(Generic[ItemT, ResultT]):
    """A queue of items, and the task that computes them. Belongs to the running event loop."""

    def __init__(
        self,
        compute: Callable[[list[ItemT]], Awaitable[Sequence[ResultT]]],
        limits: BatchLimits,
        observe: Callable[[Size], None] = lambda _: None,
    ) -> None:
        """compute: the results of a batch, in order; called for one batch at a time. MemoryError: fewer items may fit.
        observe: called for each batch."""
        self._compute, self._limits, self._observe = compute, limits, observe
        self._jobs: deque[_Job[ItemT, ResultT]] = deque()
        self._tokens = 0  # that wait
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def submit(self, items: Sequence[ItemT], sizes: Sequence[Size]) -> list[ResultT]:
        """Return the results of items, in order. If the caller is cancelled, items that wait are dropped.

        Raises the errors of `compute` for them.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        job = _Job[ItemT, ResultT](items, sizes, loop.time(), loop.create_future(), deque(range(len(items))))
        self._jobs.append(job)
        self._tokens += sum(size.tokens for size in sizes)
        self._arrived.set()
        if self._tokens >= self._limits.tokens:
            self._full.set()
        await job.done
        return [job.results[index] for index in range(len(items))]

    async def close(self) -> None:
        """Compute the items that wait, then stop."""
        while unfinished := [job.done for job in self._jobs if not job.done.done()]:
            await asyncio.wait(unfinished)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(job.arrived for job in self._jobs) + self._limits.delay):
                    await self._full.wait()
            parts = list(self._draw())
            sizes = [job.sizes[index] for job, index in parts]
            for batch in plan_batches(sizes, self._limits):
                await self._compute_batch([parts[index] for index in batch])
            self._forget()

    def _draw(self) -> Iterator[_Part[ItemT, ResultT]]:
        """Yield the items of the next batches: one of each job in turn, up to the limit of tokens, but at least one."""
        room = self._limits.tokens
        while any(job.waiting for job in self._jobs):
            if (job := self._jobs[0]).waiting:
                index = job.waiting[0]
                tokens = job.sizes[index].tokens
                if tokens > room < self._limits.tokens:  # the next batches begin with it
                    return
                room -= tokens
                yield job, job.waiting.popleft()
            self._jobs.rotate(-1)

    async def _compute_batch(self, parts: Sequence[_Part[ItemT, ResultT]]) -> None:
        """Compute items together; if that fails, half of them if memory ran out, or the items of each job on their own,
        so that only some fail."""
        parts = [(job, index) for job, index in parts if not job.done.done()]
        if not parts:
            return
        sizes = [job.sizes[index] for job, index in parts]
        sequences = sum(size.sequences for size in sizes)
        self._observe(Size(sequences, max(size.longest for size in sizes)))
        try:
            results = await self._compute([job.items[index] for job, index in parts])
            found = list(zip(parts, results, strict=True))
        except Exception as error:
            await self._retry(parts, error)
            return
        for (job, index), result in found:
            job.put(index, result)

    async def _retry(self, parts: Sequence[_Part[ItemT, ResultT]], error: Exception) -> None:
        jobs = list(dict.fromkeys(job for job, _ in parts))
        if isinstance(error, MemoryError) and parts[1:]:
            half = len(parts) // 2
            smaller = [parts[:half], parts[half:]]
        elif jobs[1:]:
            smaller = [[part for part in parts if part[0] is job] for job in jobs]
        else:
            jobs[0].fail(error)
            return
        for each in smaller:
            await self._compute_batch(each)

    def _forget(self) -> None:
        """Drop the jobs that are done, or whose callers were cancelled."""
        self._jobs = deque(job for job in self._jobs if not job.done.done())
        self._tokens = sum(job.sizes[index].tokens for job in self._jobs for index in job.waiting)
        if not self._jobs:
            self._arrived.clear()
        if self._tokens < self._limits.tokens:
            self._full.clear()
