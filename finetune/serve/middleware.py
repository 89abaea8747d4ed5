"""Middleware of a server: logs, and checks of requests by time, size, host, origin and token.

Each function wraps an ASGI application for HTTP requests, see https://asgi.readthedocs.io.
"""

import asyncio
import hmac
import time
from collections.abc import Collection
from contextlib import suppress

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experiment.local_server import LOCAL_HOSTS, host_name
from finetune.serve.admission import RETRY_SECONDS, Limits, busy
from finetune.serve.monitoring import Metrics, log, log_event

_OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # pages without data, and probes
FORM = "application/x-www-form-urlencoded"
_LONGEST_MESSAGE = 500  # characters
_DISCARDED_BYTES = 64 * 2**20  # of a request that is too large, at most
_DISCARD_SECONDS = 10.0
_HELD_BYTES = 256 * 2**20  # of the bodies of all requests that are not answered yet, at most, unless one may be larger
_GONE = 499  # as nginx logs it: the client has gone before its answer


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the message as one line of Unicode, whatever names of fields it quotes."""
    line = " ".join(message.encode("utf-8", "backslashreplace").decode("utf-8").split())
    if len(line) > _LONGEST_MESSAGE:
        line = line[:_LONGEST_MESSAGE] + " …"
    return JSONResponse({"error": line}, status, headers)


def observe(app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> ASGIApp:
    """Log and count each request, and log the errors of the application. paths: those of its routes."""

    async def observed(scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), _GONE

        async def note_status(event: Message) -> None:
            nonlocal status
            status = event.get("status", status)
            await send(event)

        try:
            await app(scope, receive, note_status)
        except Exception:  # it was answered with 500
            log.exception("an error in the server")
        finally:
            seconds = time.perf_counter() - start
            path = scope["path"] if scope["path"] in paths else "unknown"
            texts = scope.get("state", {}).get("texts", 0)
            metrics.observe_request(path, status, seconds, texts)
            figures = {"status": status, "ms": round(1000 * seconds, 1), "texts": texts}
            log_event("request", method=scope["method"], path=path, **figures)

    return observed


def require_permission(app: ASGIApp, hosts: frozenset[str] | None, token: str | None) -> ASGIApp:
    """Answer 421 to requests for another host, whose name may have been pointed at this machine (DNS rebinding), and
    401 to those without the token or, if there is none, 403 to those from pages of other sites, which lack it.
    Pages without data and probes are for all.

    hosts: names in lower case; None: any.
    """
    proxied = (hosts or frozenset()) - LOCAL_HOSTS  # a proxy may change `Host`, but not `Origin`

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        origin = headers.get("origin", f"http://{host}").lower().partition("://")[2]
        given = headers.get("authorization", "").encode("latin-1")
        answer = app
        if scope["path"] in _OPEN:
            pass
        elif hosts is not None and host_name(host) not in hosts:
            message = f"this server does not answer to the host '{host}'; `deepcloze serve --allowed_hosts` adds names"
            answer = error_response(421, message)
        elif token is None and origin != host and host_name(origin) not in proxied:
            answer = error_response(403, "requests from pages of other sites are not answered")
        elif token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            message = "expected the header `Authorization: Bearer TOKEN` with the token of this server"
            answer = error_response(401, message, {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)

    return checked


def read_as_json(app: ASGIApp, paths: Collection[str]) -> ASGIApp:
    """Let bodies without a type be read as JSON at these paths; also forms, as which `curl -d` sends them."""

    async def changed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in paths:
            headers = MutableHeaders(scope=scope)
            if headers.get("content-type", FORM).partition(";")[0].strip().lower() == FORM:
                headers["content-type"] = "application/json"
        await app(scope, receive, send)

    return changed


def limit_size(app: ASGIApp, limits: Limits) -> ASGIApp:
    """Answer 413 to requests that are too large, before they are read or parsed. Before any answer, discard what is
    left of the body: most clients read the answer once they have sent all, and lose it if the connection is closed
    before. Answer 503 if the bodies of all requests take too much memory."""
    most, held = max(_HELD_BYTES, limits.max_bytes), 0

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal held
        message = f"the request is larger than {limits.max_bytes // 1024:,} KiB"
        headers = Headers(scope=scope)
        announced, received, own = int(headers.get("content-length", "0")), 0, 0  # own: its part of `held`
        # With "Expect: 100-continue", no body is sent before we ask for it.
        unread = "expect" not in headers and announced <= _DISCARDED_BYTES

        async def count() -> Message:
            nonlocal received, unread, held, own
            event = await receive()
            size = len(event.get("body", b""))
            received += size
            unread = event.get("more_body", False)
            if received > limits.max_bytes:
                raise HTTPException(413, message)
            if size and held + size > most:
                raise busy("the requests that are being answered are too large together; try again")
            held, own = held + size, own + size
            return event

        async def answer(event: Message) -> None:
            nonlocal unread, held, own
            if unread:
                held, own, unread = held - own, 0, False  # a slow client must not keep others waiting
                await _discard(receive)
            await send(event)

        if announced > limits.max_bytes:
            await error_response(413, message)(scope, receive, answer)
            return
        try:
            await app(scope, count, answer)
        finally:
            held -= own

    return limited


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, up to limits of size and time."""
    discarded, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while more and discarded < _DISCARDED_BYTES:
                event = await receive()
                discarded += len(event.get("body", b""))
                more = event.get("more_body", False)


def limit_time(app: ASGIApp, limits: Limits) -> ASGIApp:
    """Answer 408 to a request that does not arrive in time, 503 to one that is not answered in time. Cancel the work
    for a request whose client has gone."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.current_task()
        assert answering is not None
        started, gone, watching = False, False, None  # watching: since the request has arrived

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            answering.cancel()

        async def note_arrival() -> Message:
            nonlocal watching, gone
            if (event := await receive())["type"] == "http.disconnect":
                gone = True
                raise asyncio.CancelledError
            if watching is None and not event.get("more_body", False):
                watching = asyncio.create_task(watch())
            return event

        async def note_start(event: Message) -> None:
            nonlocal started
            started = True
            if watching is not None:
                watching.cancel()  # the end of an answer looks like a client that goes
            await send(event)

        try:
            async with asyncio.timeout(limits.timeout):
                await app(scope, note_arrival, note_start)
        except TimeoutError:
            if not started:
                await _timeout_response(watching is not None, limits.timeout)(scope, receive, note_start)
        except asyncio.CancelledError:
            if not gone:
                raise
            answering.uncancel()
        finally:
            if watching is not None:
                watching.cancel()

    return limited


def _timeout_response(arrived: bool, seconds: float) -> JSONResponse:
    if arrived:
        return error_response(503, f"not answered within {seconds:g} s; try again", {"Retry-After": RETRY_SECONDS})
    return error_response(408, f"the request did not arrive within {seconds:g} s", {"Connection": "close"})
