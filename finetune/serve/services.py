"""Requests to answers: encode in threads, compute in batches in one thread, decode.

Each model has batchers of its own. A reload puts another `Services` in place; requests that began with the old one are
answered by it.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from experiment.errors import UserError
from finetune.data.records import Record
from finetune.embedder import EmbeddedText, Pooling
from finetune.encoding.encoder import Tokens
from finetune.encoding.examples import Example
from finetune.mask_filler import Candidates, MaskedText, MaskFiller
from finetune.predictor import Predictor
from finetune.serve.batching import Batcher, BatchLimits, BatchSize, Size
from finetune.serve.served_model import ServedModel


class _Encoded(Protocol):
    @property
    def sequences(self) -> tuple[Tokens, ...]: ...

    @property
    def longest(self) -> int: ...


ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Services:
    """A model that answers requests of many clients. Belongs to the running event loop."""

    def __init__(
        self, served: ServedModel, limits: BatchLimits, thread: Executor, observe: Callable[[BatchSize], None]
    ) -> None:
        """thread: the one that computes."""
        self.served = served
        self._users = 0
        self._unused = asyncio.Event()
        self._padded = served.loaded.padding.length

        def batcher(compute: Callable[[list[ItemT]], Sequence[ResultT]]) -> Batcher[ItemT, ResultT]:
            async def in_thread(items: list[ItemT]) -> Sequence[ResultT]:
                return await asyncio.get_running_loop().run_in_executor(thread, compute, items)

            return Batcher(in_thread, limits, observe)

        predictor = served.predictor if served.filler is None else served.filler.ranking
        assert predictor is not None, "a model predicts or fills masks"
        self._examples: Batcher[Example, Any] = batcher(predictor.compute)
        self._embedded: Batcher[EmbeddedText, list[float]] = batcher(served.embedder.compute)
        self._masked: Batcher[MaskedText, Candidates] | None = None
        if served.filler is not None:
            self._masked = batcher(served.filler.compute)

    @contextmanager
    def used(self) -> Iterator["Services"]:
        """For each request: what uses it is answered before it closes."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            self._unused.set()

    async def close(self) -> None:
        """Wait for the requests that use it, then stop."""
        while self._users:
            self._unused.clear()
            await self._unused.wait()
        batchers = (self._examples, self._embedded, self._masked)
        await asyncio.gather(*(batcher.close() for batcher in batchers if batcher is not None))

    async def predict(self, records: Sequence[Record], calibrated: bool) -> list[Any]:
        """See `Predictor.predict_records`. The model must predict."""
        predictor = self.served.predictor
        assert predictor is not None
        predictor.check_calibrated(calibrated)
        return await self._predict(predictor, records, calibrated)

    async def fill(self, texts: Sequence[str], top_k: int) -> list[Any]:
        """See `MaskFiller.fill`. The model must fill masks."""
        filler, batcher = self.served.filler, self._masked
        assert filler is not None and batcher is not None  # noqa: PT018
        encoded = await asyncio.to_thread(_encode_masked, filler, texts, top_k)
        found = await batcher.submit(encoded, self._sizes(encoded))
        return await asyncio.to_thread(lambda: [filler.describe(candidates) for candidates in found])

    async def rank(self, texts: Sequence[str], options: Sequence[Sequence[Sequence[str]]]) -> list[Any]:
        """The options of each mask of each text, the most probable first. The model must fill masks."""
        filler = self.served.filler
        assert filler is not None
        if len(texts) != len(options):
            raise UserError(f"options: expected a list for each of {len(texts)} texts, found {len(options)}")
        records = [
            filler.option_record(text, each, f"texts[{index}]")
            for index, (text, each) in enumerate(zip(texts, options, strict=True))
        ]
        found = await self._predict(filler.ranking, records, False)
        return [
            filler.rank(record, prediction["probabilities"]) for record, prediction in zip(records, found, strict=True)
        ]

    async def embed(self, texts: Sequence[str], pooling: Pooling) -> list[list[float]]:
        """See `Embedder`."""
        encoded = await asyncio.to_thread(self.served.embedder.encode, texts, pooling)
        return await self._embedded.submit(encoded, self._sizes(encoded))

    async def _predict(self, predictor: Predictor, records: Sequence[Record], calibrated: bool) -> list[Any]:
        split = await asyncio.to_thread(predictor.encode, records)
        outputs = await self._examples.submit(split.examples, self._sizes(split.examples))
        return await asyncio.to_thread(predictor.decode, split, outputs, calibrated)

    def _sizes(self, items: Sequence[_Encoded]) -> list[Size]:
        return [Size(len(item.sequences), self._padded or item.longest) for item in items]


def _encode_masked(filler: MaskFiller, texts: Sequence[str], top_k: int) -> list[MaskedText]:
    return [filler.encode(text, f"texts[{index}]", top_k) for index, text in enumerate(texts)]
