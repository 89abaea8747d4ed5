"""What `GET /metrics` tells Prometheus. Docs: docs/serving.md."""

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
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from finetune.serve.batching import BatchSize
from finetune.serve.limits import Admission

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

CONTENT_TYPE = CONTENT_TYPE_LATEST


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
        self._texts = Counter("deepcloze_texts", "Texts that were asked for.", ["path"], registry=self._registry)
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

    def observe_batch(self, size: BatchSize) -> None:
        self._batches.observe(size.sequences)
        self._tokens.inc(size.padded_tokens)

    def observe_reload(self, succeeded: bool) -> None:
        self._reloads.labels("success" if succeeded else "failure").inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
