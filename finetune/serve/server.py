"""uvicorn, with the signals and timeouts of this server."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiment.errors import UserError

_HEADER_SECONDS = 10.0  # for the headers of a request
_IDLE_SECONDS = 30  # until a connection without requests is closed
_BACKLOG = 2048


class _Protocol(H11Protocol):
    """Closes connections whose clients are slow to send the headers of a request, which uvicorn waits for forever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def _expect_headers(self) -> None:
        """Start the clock while there is no request, unless it runs already."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEADER_SECONDS, self.timeout_keep_alive_handler)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None], on_reload: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started, self._on_reload = on_started, on_reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C stop the server, SIGHUP reloads the model. uvicorn's own would end with the signal."""
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGHUP: self._on_reload}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        """Finish what was accepted; the second time, do not wait for it."""
        self.force_exit, self.should_exit = self.should_exit, True


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, but does not listen yet. Raises UserError for an address that cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: cannot listen on '{host}': {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from None
    return listener


def run_server(
    app: ASGIApp,
    listener: socket.socket,
    grace: float,
    on_started: Callable[[], None],
    on_reload: Callable[[], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the requests that were accepted, for at most `grace` seconds.

    Raises UserError if another server has taken the port in the meantime.
    """
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
    config = uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="on",
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=round(grace + 1),
        **options,
    )
    host, port = listener.getsockname()[:2]
    try:
        _Server(config, on_started, on_reload).run([listener])
    except OSError as error:
        raise _unusable(host, port, error) from None


def _unusable(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--port: cannot listen on {host}:{port}: {error.strerror}")
