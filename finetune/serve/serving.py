"""The state of a server: the model that answers, and counts and limits of requests.

Texts are encoded in threads, computed in batches in one thread, and decoded. Each model has batchers of its own. A
reload puts another `Services` in place; requests that began with the old one are answered by it.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, TypeVar

import torch
from fastapi import HTTPException

from experiment.errors import UserError, is_out_of_memory
from experiment.process.daemon_thread import in_daemon_thread
from experiment.process.hardware import trim_memory
from finetune.data.records import Record
from finetune.encoding.examples import Example, Split
from finetune.pooling import Pooling
from finetune.prediction.predictor import Predictor
from finetune.serve.batching import Batcher, BatchLimits, Size
from finetune.serve.monitoring import Metrics, log, log_event
from finetune.serve.request_checks import Admission, Limits
from finetune.serve.served_model import ServedModel

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_BATCH_COST = {"cpu": 64, "cuda": 4096}  # tokens that take as long to compute as the fixed costs of a batch


ResultT = TypeVar("ResultT")


def _computes(device: torch.device) -> bool:
    """Return whether a device computes. After some errors of a GPU, all that its process computes there fails."""
    try:
        return torch.ones(1, device=device).tolist() == [1]
    except RuntimeError as error:
        return is_out_of_memory(error)


class Services:
    """A model that answers requests of many clients. Belongs to the running event loop."""

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
    def used(self) -> Iterator["Services"]:
        """Use the services for a request, which is answered before they close."""
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
        """See `Predictor.predict_records`. batcher: if the predictor is an embedder.

        Raises HTTPException for options that would take too much memory.
        """
        predictor.check_calibrated(calibrated)

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
            message = f"a text whose options have {most:,} tokens; at most {limit:,} are accepted"
            raise HTTPException(413, message)
        return sizes


class Serving:
    """Answers requests while it is entered, `async with`."""

    def __init__(
        self,
        served: ServedModel,
        load: Callable[[], ServedModel],
        limits: Limits,
        batch_delay: float,
        batch_tokens: int | None = None,
    ) -> None:
        """load: loads the model again. batch_delay: seconds. batch_tokens: default: as the device needs."""
        self._first: ServedModel | None = served
        self._load = load
        self._delay, self._batch_tokens = batch_delay, batch_tokens
        self._thread = ThreadPoolExecutor(1, "model")
        self._wanted = asyncio.Event()
        self.limits = limits
        self.admission = Admission(limits)
        self.metrics = Metrics(self.admission)

    async def __aenter__(self) -> Self:
        assert self._first is not None, "entered twice"
        self._services, self._first = self._serve(self._first), None
        self._reloading = asyncio.create_task(self._reload_when_wanted())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reloading.cancel()
        await self._services.close()
        self._thread.shutdown()

    @property
    def served(self) -> ServedModel:
        return self._services.served

    @property
    def device_failed(self) -> bool:
        return self._services.device_failed

    @contextmanager
    def answering(self, texts: int, options: int = 0) -> Iterator[Services]:
        """Admit a request. options: of all texts, for masks or as choices. Raises HTTPException for too many."""
        with self.admission.admit(texts, options), self._services.used() as services:
            yield services

    def reload(self) -> None:
        """Reload the model in the background. Requests are answered by the old one until then."""
        self._wanted.set()

    async def _reload_when_wanted(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                served = await asyncio.wrap_future(in_daemon_thread(self._load, "load"))
            except UserError as error:
                log_event("the model was not reloaded: the old one stays", logging.ERROR, reason=str(error))
            except Exception:
                log.exception("the model was not reloaded: the old one stays")
            else:
                await self._replace(served)
                self.metrics.observe_reload(succeeded=True)
                continue
            self.metrics.observe_reload(succeeded=False)

    async def _replace(self, served: ServedModel) -> None:
        old, self._services = self._services, self._serve(served)
        log_event("the model was reloaded", **served.info.model_dump(include={"model", "kind", "precision"}))
        await old.close()
        del old
        gc.collect()
        trim_memory()  # of the old one

    def _serve(self, served: ServedModel) -> Services:
        device = served.loaded.device.torch_device.type
        tokens = self._batch_tokens or _BATCH_TOKENS[device]
        batch_limits = BatchLimits(tokens, self._delay, _BATCH_COST[device])
        return Services(served, self.limits, batch_limits, self._thread, self.metrics.observe_batch)
