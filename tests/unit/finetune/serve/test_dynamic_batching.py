"""Dynamic batching, without a model: items are numbers, and the result of one is its square."""

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from finetune.serve import batching
from finetune.serve.batching import Batcher, BatchLimits, Size, plan_batches

LIMITS = BatchLimits(tokens=100, delay=0.0, padding=20)


def ones(count: int) -> list[Size]:
    return [Size(1, 10)] * count


class Squares:
    """Records its batches. It computes when it is permitted to: a test decides what waits meanwhile."""

    def __init__(self, open_from_start: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.permitted = asyncio.Event()
        if open_from_start:
            self.permitted.set()

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.batches.append(items)
        await self.permitted.wait()
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [item * item for item in items]


def in_event_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Decorator of a test that is a coroutine: runs it, for a minute at most."""

    async def within_time(**fixtures: Any) -> None:
        async with asyncio.timeout(60):
            await test(**fixtures)

    return functools.wraps(test)(lambda **fixtures: asyncio.run(within_time(**fixtures)))


def test_every_item_is_in_one_batch() -> None:
    """Catches an item that is lost or computed twice, a batch over the limit, and padding beyond the limit."""
    draw = random.Random(0)
    for _ in range(200):
        sizes = [Size(draw.randint(1, 4), draw.randint(1, 60)) for _ in range(draw.randint(1, 40))]
        batches = plan_batches(sizes, LIMITS)
        assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
        for batch in batches:
            sequences, longest = sum(sizes[i].sequences for i in batch), max(sizes[i].longest for i in batch)
            assert len(batch) == 1 or sequences * longest <= LIMITS.tokens
            assert sequences * longest - sum(sizes[i].tokens for i in batch) <= LIMITS.padding


def test_texts_of_one_length_share_a_batch() -> None:
    """Catches a batch per text, which computes several times as long."""
    assert len(plan_batches([Size(1, 10)] * 10, LIMITS)) == 1


@in_event_loop
async def test_requests_get_their_own_results() -> None:
    """Catches results that are swapped between requests of one batch."""
    squares = Squares()
    batcher = Batcher(squares, LIMITS)
    numbers = [list(range(start, start + start % 5)) for start in range(50)]
    found = await asyncio.gather(*(batcher.submit(each, ones(len(each))) for each in numbers))
    assert found == [[number * number for number in each] for each in numbers]
    assert len(squares.batches) < 50
    await batcher.close()


@in_event_loop
async def test_what_waits_forms_the_next_batch() -> None:
    """Catches requests that are computed one by one while the model is busy."""
    squares, sizes = Squares(open_from_start=False), list[Size]()
    batcher = Batcher(squares, LIMITS, sizes.append)
    first = asyncio.create_task(batcher.submit([0], ones(1)))
    while not squares.batches:
        await asyncio.sleep(0)
    others = [asyncio.create_task(batcher.submit([number], ones(1))) for number in range(1, 6)]
    await asyncio.sleep(0)
    squares.permitted.set()
    await asyncio.gather(first, *others)
    assert squares.batches == [[0], [1, 2, 3, 4, 5]]
    assert sizes == [Size(1, 10), Size(5, 10)]
    await batcher.close()


@in_event_loop
async def test_batches_are_full() -> None:
    """Catches an item more than a batch has room for, which is then computed alone, as every second batch."""
    squares = Squares()
    batcher = Batcher(squares, LIMITS)
    await batcher.submit(list(range(8)), [Size(1, 30)] * 8)
    assert squares.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]
    await batcher.close()


@in_event_loop
async def test_a_small_request_is_not_behind_a_large_one() -> None:
    """Catches a queue in order of arrival, in which one client makes all others wait."""
    squares = Squares(open_from_start=False)
    batcher = Batcher(squares, LIMITS)
    large = asyncio.create_task(batcher.submit(list(range(1000)), ones(1000)))
    while not squares.batches:
        await asyncio.sleep(0)
    small = asyncio.create_task(batcher.submit([7], ones(1)))
    await asyncio.sleep(0)
    squares.permitted.set()
    assert await small == [49]
    assert any(7 in batch and batch[0] != 0 for batch in squares.batches[:3])
    assert len(await large) == 1000
    await batcher.close()


@in_event_loop
async def test_an_error_reaches_only_its_request() -> None:
    """Catches a request that fails because of another one in its batch."""
    squares = Squares(open_from_start=False)
    batcher = Batcher(squares, LIMITS)
    tasks = [asyncio.create_task(batcher.submit([number], ones(1))) for number in (1, -1, 2)]
    await asyncio.sleep(0)
    squares.permitted.set()
    good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert (good, other) == ([1], [4])
    assert isinstance(bad, ValueError)
    assert await batcher.submit([3], ones(1)) == [9]
    await batcher.close()


@in_event_loop
async def test_a_batch_is_halved_when_memory_runs_out() -> None:
    """Catches requests that fail although memory suffices for each of their items, or because of an item of another
    request, and a bug that is retried in halves."""
    batches: list[list[int]] = []

    async def compute(items: list[int]) -> list[int]:
        batches.append(items)
        if 9 in items:
            raise ValueError("a bug")
        if len(items) > 2 or 5 in items:
            raise MemoryError
        return items

    batcher = Batcher(compute, LIMITS)
    found = await asyncio.gather(
        batcher.submit([0, 1, 2], ones(3)), batcher.submit([3, 5], ones(2)), return_exceptions=True
    )
    assert found[0] == [0, 1, 2]
    assert isinstance(found[1], MemoryError)
    batches.clear()
    with pytest.raises(ValueError, match="a bug"):
        await batcher.submit([9, 8], ones(2))
    assert batches == [[9, 8]]
    await batcher.close()


@in_event_loop
async def test_items_of_a_cancelled_request_are_dropped() -> None:
    """Catches a model that computes for clients that are gone while others wait."""
    squares = Squares(open_from_start=False)
    batcher = Batcher(squares, LIMITS)
    first = asyncio.create_task(batcher.submit([0], ones(1)))
    while not squares.batches:
        await asyncio.sleep(0)
    gone = asyncio.create_task(batcher.submit(list(range(100, 200)), ones(100)))
    other = asyncio.create_task(batcher.submit([1], ones(1)))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    squares.permitted.set()
    assert (await first, await other) == ([0], [1])
    assert [item for batch in squares.batches for item in batch] == [0, 1]
    await batcher.close()


@pytest.mark.parametrize("item", [3, -3])
@in_event_loop
async def test_a_client_may_leave_while_its_items_are_computed(item: int) -> None:
    """Catches a batcher that ends with a result, or an error, for nobody: all later requests would wait forever."""
    squares = Squares(open_from_start=False)
    batcher = Batcher(squares, LIMITS)
    gone = asyncio.create_task(batcher.submit([item], ones(1)))
    while not squares.batches:
        await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    squares.permitted.set()
    assert await batcher.submit([2], ones(1)) == [4]
    await batcher.close()


@in_event_loop
async def test_items_of_a_request_cancelled_between_its_batches_are_dropped() -> None:
    """Catches batches that were planned before a client left, and are computed for it."""
    computed = []

    async def compute(items: Sequence[int]) -> Sequence[int]:
        computed.append(items)
        if len(computed) == 1:
            gone.cancel()
            await asyncio.sleep(0)
        return items

    batcher = Batcher(compute, BatchLimits(tokens=100, delay=0.0, padding=0))
    kept = asyncio.create_task(batcher.submit([1], [Size(1, 50)]))
    gone = asyncio.create_task(batcher.submit([2], [Size(1, 10)]))
    assert await kept == [1]
    await asyncio.sleep(0)
    await batcher.close()
    assert computed == [[1]]


@in_event_loop
async def test_answers_are_in_the_order_of_the_items() -> None:
    """Catches the order in which batches of other lengths are computed."""
    batcher = Batcher(Squares(), LIMITS)
    assert await batcher.submit([1, 2, 3, 4], [Size(1, tokens) for tokens in (10, 60, 20, 90)]) == [1, 4, 9, 16]
    await batcher.close()


@in_event_loop
async def test_closing_answers_what_waits() -> None:
    """Catches a reload or shutdown that drops accepted requests, or waits forever."""
    batcher = Batcher(Squares(), LIMITS)
    tasks = [asyncio.create_task(batcher.submit([number], ones(1))) for number in range(40)]
    await asyncio.sleep(0)
    await batcher.close()
    assert [task.result() for task in tasks] == [[number * number] for number in range(40)]


@pytest.mark.parametrize("tokens", [10, 100])
@in_event_loop
async def test_a_full_batch_does_not_wait(tokens: int) -> None:
    """Catches a delay that is added although nothing more fits, or a batch that waits forever for more."""
    batcher = Batcher(Squares(), BatchLimits(tokens=tokens, delay=1e9 if tokens == 10 else 0.001, padding=0))
    assert await batcher.submit([2], ones(1)) == [4]
    await batcher.close()


@in_event_loop
async def test_texts_that_have_waited_are_not_delayed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a device that is idle before each batch, although texts have waited during the last one."""
    loop, skipped = asyncio.get_running_loop(), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + skipped)
    squares = Squares(open_from_start=False)
    batcher = Batcher(squares, BatchLimits(tokens=20, delay=50.0, padding=0))
    first = asyncio.create_task(batcher.submit([1, 2], ones(2)))
    while not squares.batches:
        await asyncio.sleep(0)
    second = asyncio.create_task(batcher.submit([3], ones(1)))
    await asyncio.sleep(0)
    skipped = 50.0
    squares.permitted.set()
    assert await asyncio.gather(first, second) == [[1, 4], [9]]
    await batcher.close()


@in_event_loop
async def test_a_server_without_requests_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a loop that looks for items as fast as it can, and takes a core."""
    planned = []
    monkeypatch.setattr(batching, "plan_batches", lambda *given: planned.append(given) or plan_batches(*given))
    batcher = Batcher(Squares(), LIMITS)
    assert await batcher.submit([2], ones(1)) == [4]
    for _ in range(100):
        await asyncio.sleep(0)
    await batcher.close()
    assert len(planned) == 1


@in_event_loop
async def test_no_items_need_no_batch() -> None:
    """Catches an empty request that waits forever."""
    batcher = Batcher(Squares(), LIMITS)
    assert await batcher.submit([], []) == []
    await batcher.close()


@in_event_loop
async def test_a_wrong_number_of_results_is_an_error_of_the_request() -> None:
    """Catches a batcher that ends silently, after which every request waits for its timeout."""

    async def compute(items: list[int]) -> list[int]:
        return items[1:] if items[0] == 0 else items

    batcher = Batcher(compute, LIMITS)
    with pytest.raises(ValueError, match="shorter"):
        await batcher.submit([0, 1], ones(2))
    assert await batcher.submit([3], ones(1)) == [3]
    await batcher.close()
