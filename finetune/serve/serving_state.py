"""The state of a server: the model that answers, and counts and limits of requests.

A reload puts another `ModelWorker` in place; requests that began with the old one are answered by it.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

from experiment.errors import UserError
from experiment.process.daemon_thread import in_daemon_thread
from experiment.process.hardware import trim_memory
from finetune.serve.admission import Admission, Limits
from finetune.serve.batching import BatchLimits
from finetune.serve.model_worker import ModelWorker
from finetune.serve.monitoring import Metrics, log, log_event
from finetune.serve.served_model import ServedModel

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_BATCH_COST = {"cpu": 64, "cuda": 4096}  # tokens that take as long to compute as the fixed costs of a batch


class ServingState:
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
        self._worker, self._first = self._new_worker(self._first), None
        self._reloading = asyncio.create_task(self._reload_when_wanted())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reloading.cancel()
        await self._worker.close()
        self._thread.shutdown()

    @property
    def served(self) -> ServedModel:
        return self._worker.served

    @property
    def device_failed(self) -> bool:
        return self._worker.device_failed

    @contextmanager
    def answering(self, texts: int, options: int = 0) -> Iterator[ModelWorker]:
        """Admit a request. options: of all texts, for masks or as choices. Raises HTTPException for too many."""
        with self.admission.admit(texts, options), self._worker.used() as worker:
            yield worker

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
        old, self._worker = self._worker, self._new_worker(served)
        known = served.info.model_dump(include={"kind", "precision"})
        log_event("the model was reloaded", model=str(served.loaded.folder), **known)
        await old.close()
        del old
        gc.collect()
        trim_memory()  # of the old one

    def _new_worker(self, served: ServedModel) -> ModelWorker:
        device = served.loaded.device.torch_device.type
        tokens = self._batch_tokens or _BATCH_TOKENS[device]
        batch_limits = BatchLimits(tokens, self._delay, _BATCH_COST[device])
        return ModelWorker(served, self.limits, batch_limits, self._thread, self.metrics.observe_batch)
