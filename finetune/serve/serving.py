"""The state of a server: the model that answers, and what counts and limits requests."""

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from experiment.errors import UserError
from finetune.serve.batching import BatchLimits
from finetune.serve.limits import Admission, Limits
from finetune.serve.logs import log, log_event
from finetune.serve.metrics import Metrics
from finetune.serve.served_model import ServedModel
from finetune.serve.services import Services

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_BATCH_COST = {"cpu": 64, "cuda": 4096}  # tokens that take as long to compute as the fixed costs of a batch


class Serving:
    """Answers requests while it is entered, `async with`."""

    def __init__(
        self,
        served: ServedModel,
        load: Callable[[], ServedModel],
        limits: Limits,
        batch_delay: float = 0.002,
        batch_tokens: int | None = None,
    ) -> None:
        """load: loads the model again, for a reload. batch_delay: seconds. batch_tokens: default: as the device
        needs."""
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

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reloading.cancel()
        await self._services.close()
        self._thread.shutdown()

    @property
    def served(self) -> ServedModel:
        return self._services.served

    @contextmanager
    def answering(self, texts: int) -> Iterator[Services]:
        """For each request. Raises HTTPException for too many texts."""
        with self.admission.admit(texts), self._services.used() as services:
            yield services

    def reload(self) -> None:
        """Reload the model in the background. Requests are answered by the old one until then."""
        self._wanted.set()

    async def _reload_when_wanted(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                served = await asyncio.to_thread(self._load)
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
        gc.collect()  # of the memory of the old one

    def _serve(self, served: ServedModel) -> Services:
        device = served.loaded.device.device.type
        tokens = self._batch_tokens or _BATCH_TOKENS[device]
        limits = BatchLimits(tokens, self._delay, _BATCH_COST[device])
        return Services(served, limits, self._thread, self.metrics.observe_batch)
