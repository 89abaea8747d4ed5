"""Logs and metrics of a server. None holds text of a client: not its texts, its query, nor exception messages about
them. docs/serving.md describes both.
"""

import json
import logging
import traceback
from datetime import UTC, datetime

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from finetune.serve.admission import Admission
from finetune.serve.batching import Size

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

log = logging.getLogger("finetune.serve")

_FIELDS = "fields"  # of a record, to write with its message


class Metrics:
    """The counts of one server."""

    def __init__(self, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        for collector in (GC_COLLECTOR, PLATFORM_COLLECTOR):
            self._registry.register(collector)
        names = ("path", "status")
        self._requests = Counter("deepcloze_requests", "Requests that were answered.", names, registry=self._registry)
        self._seconds = Histogram(
            "deepcloze_request_seconds", "Time to answer.", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self._texts = Counter("deepcloze_texts", "Texts in requests.", ["path"], registry=self._registry)
        self._batches = Histogram(
            "deepcloze_batch_sequences", "Sequences in a batch.", buckets=_SEQUENCES, registry=self._registry
        )
        self._tokens = Counter("deepcloze_tokens", "Tokens that were computed, with padding.", registry=self._registry)
        self._reloads = Counter("deepcloze_reloads", "Reloads of the model.", ["result"], registry=self._registry)
        waiting = Gauge("deepcloze_queue_texts", "Texts that are being answered.", registry=self._registry)
        waiting.set_function(lambda: admission.texts)

    def observe_request(self, path: str, status: int, seconds: float, texts: int) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        self._texts.labels(path).inc(texts)

    def observe_batch(self, size: Size) -> None:
        self._batches.observe(size.sequences)
        self._tokens.inc(size.tokens)

    def observe_reload(self, succeeded: bool) -> None:
        self._reloads.labels("success" if succeeded else "failure").inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["traceback"] = [line.strip() for line in traceback.format_tb(record.exc_info[2])]
        return json.dumps(line)


def log_as_json() -> logging.Handler:
    """Send everything that is logged to stderr, as JSON. Returns the handler of the root logger that does."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("uvicorn.error", "asyncio", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return handler


def log_event(message: str, level: int = logging.INFO, **fields: object) -> None:
    log.log(level, message, extra={_FIELDS: fields})
