"""One model that answers requests of many clients.

Texts are encoded in threads, computed in batches in one thread, and decoded.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, TypeVar

import torch
from fastapi import HTTPException

from experiment.errors import UserError, is_out_of_memory
from finetune.data.records import Record
from finetune.encoding.examples import Example, Split
from finetune.pooling import Pooling
from finetune.prediction.predictor import Predictor, check_calibrated
from finetune.serve.admission import Limits
from finetune.serve.batching import Batcher, BatchLimits, Size
from finetune.serve.monitoring import log
from finetune.serve.served_model import ServedModel

ResultT = TypeVar("ResultT")


def _computes(device: torch.device) -> bool:
    """Return whether a device computes. After some errors of a GPU, all that its process computes there fails."""
    try:
        return torch.ones(1, device=device).tolist() == [1]
    except RuntimeError as error:
        return is_out_of_memory(error)


class ModelWorker:
    """Encodes, computes and decodes with one model until it is replaced. Belongs to the running event loop."""

    def __init__(
        self,
        served: ServedModel,
        limits: Limits,
        batch_limits: BatchLimits,
        thread: Executor,
        observe: Callable[[Size], None],
    ) -> None:
        """thread: the one that computes."""
        self.served = served
        self._limits = limits
        self._users = 0
        self._unused = asyncio.Event()
        self._padded = served.loaded.padding.length
        self._warned = False
        device = served.loaded.device.torch_device
        self.device_failed = False  # nothing can be computed in this process any more

        def batcher(compute: Callable[[list[Example]], Sequence[ResultT]]) -> Batcher[Example, ResultT]:
            async def in_thread(items: list[Example]) -> Sequence[ResultT]:
                run = partial(asyncio.get_running_loop().run_in_executor, thread)
                try:
                    return await run(compute, items)
                except Exception as error:
                    if not is_out_of_memory(error):
                        if isinstance(error, torch.AcceleratorError) and not await run(_computes, device):
                            self.device_failed = True
                        raise
                    if len(items) == 1:
                        log.exception("out of memory")
                    elif not self._warned:
                        self._warned = True
                        log.warning("out of memory: computing fewer than %d texts at once", len(items))
                torch.cuda.empty_cache()  # not above: `error` keeps tensors
                raise MemoryError

            return Batcher(in_thread, batch_limits, observe)

        predictor = served.predictor if served.filler is None else served.filler.ranking
        assert predictor is not None, "a model predicts or fills masks"
        self._examples: Batcher[Example, Any] = batcher(predictor.compute)
        self._embedded = {pooling: batcher(embedder.compute) for pooling, embedder in served.embedders.items()}
        self._masked = None if served.filler is None else batcher(served.filler.compute)

    @contextmanager
    def used(self) -> Iterator[Self]:
        """Use the model for a request, which is answered before the worker closes."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            self._unused.set()

    async def close(self) -> None:
        """Wait for the requests that use the model, then stop."""
        while self._users:
            self._unused.clear()
            await self._unused.wait()
        batchers = (self._examples, self._masked, *self._embedded.values())
        await asyncio.gather(*(batcher.close() for batcher in batchers if batcher is not None))

    async def fill(self, texts: Sequence[str], top_k: int) -> list[Any]:
        """See `MaskFiller.fill`. The model must fill masks."""
        filler, batcher = self.served.filler, self._masked
        assert filler is not None and batcher is not None  # noqa: PT018
        encoded = await asyncio.to_thread(
            lambda: [filler.encode(text, f"texts[{index}]", top_k) for index, text in enumerate(texts)]
        )
        found = await batcher.submit(encoded, self._sizes(encoded))
        return await asyncio.to_thread(lambda: [filler.describe(candidates) for candidates in found])

    async def rank(self, texts: Sequence[str], options: Sequence[Sequence[Sequence[str]]]) -> list[Any]:
        """Return the options of each mask of each text, the most probable first. The model must fill masks."""
        filler = self.served.filler
        assert filler is not None
        if len(texts) != len(options):
            raise UserError(f"options: expected a list for each of {len(texts)} texts, found {len(options)}")
        records = [
            filler.option_record(text, each, f"texts[{index}]")
            for index, (text, each) in enumerate(zip(texts, options, strict=True))
        ]
        found = await self.predict(filler.ranking, records)
        return [
            filler.rank(record, prediction["probabilities"]) for record, prediction in zip(records, found, strict=True)
        ]

    async def embed(self, texts: Sequence[str], pooling: Pooling | None) -> list[list[float]]:
        """Return a vector for each text. The model must embed."""
        pooling = pooling or self.served.pooling
        records = [Record(f"texts[{index}]", {"text": text}) for index, text in enumerate(texts)]
        found = await self.predict(self.served.embedders[pooling], records, batcher=self._embedded[pooling])
        return [prediction["embedding"] for prediction in found]

    async def predict(
        self,
        predictor: Predictor,
        records: Sequence[Record],
        calibrated: bool = False,
        batcher: Batcher[Example, Any] | None = None,
    ) -> list[Any]:
        """See `Predictor.predict`. batcher: if the predictor is an embedder.

        Raises HTTPException for options that would take too much memory.
        """
        check_calibrated(calibrated, predictor.temperature)

        def encode() -> Split:
            tokens = predictor.count_option_tokens(records)
            if tokens > self._limits.max_option_tokens:  # before they are encoded, which takes as much memory
                message = f"ranking the options takes {tokens:,} tokens, as each of theirs is masked in turn"
                raise HTTPException(413, f"{message}; at most {self._limits.max_option_tokens:,} are accepted")
            return predictor.encode(records)

        split = await asyncio.to_thread(encode)
        outputs = await (batcher or self._examples).submit(split.examples, self._sizes(split.examples))
        return await asyncio.to_thread(predictor.decode, split, outputs, calibrated)

    def _sizes(self, items: Sequence[Example]) -> list[Size]:
        """Return sizes. Raises HTTPException for an item that takes too much time or memory: it is computed at once."""
        sizes = [Size(len(item.sequences), self._padded or item.longest) for item in items]
        if (most := max((size.tokens for size in sizes), default=0)) > (limit := self._limits.max_item_tokens):
            raise HTTPException(413, f"a text, with its options, has {most:,} tokens; at most {limit:,} are accepted")
        return sizes
