"""Log lines in JSON, one for each request. None holds text of a client: not its texts, its query, nor what an exception
says about them."""

import json
import logging
import time
import traceback
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serve.metrics import Metrics

log = logging.getLogger("finetune.serve")

_FIELDS = "fields"  # of a record: what to write besides its message


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


def log_as_json() -> None:
    """Send everything that is logged to stderr, as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("uvicorn.error", "asyncio", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def log_event(message: str, level: int = logging.INFO, **fields: object) -> None:
    log.log(level, message, extra={_FIELDS: fields})


def observe(app: ASGIApp, metrics: Metrics) -> ASGIApp:
    """Log and count each request, and log the errors of the application."""

    async def observed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def note_status(event: Message) -> None:
            nonlocal status
            status = event.get("status", status)
            await send(event)

        try:
            await app(scope, receive, note_status)
        except Exception:  # it was answered with 500
            log.exception("an error in the server")
        finally:
            _report(scope, status, time.perf_counter() - start, metrics)

    return observed


def _report(scope: Scope, status: int, seconds: float, metrics: Metrics) -> None:
    path = getattr(scope.get("route"), "path", "unknown")
    texts = scope.get("state", {}).get("texts", 0)
    metrics.observe_request(path, status, seconds, texts)
    log_event("request", method=scope["method"], path=path, status=status, ms=round(1000 * seconds, 1), texts=texts)
