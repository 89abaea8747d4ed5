"""`deepcloze serve`: check the options, load the model, run uvicorn with signals and timeouts of its own."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiment.errors import UserError, readable_disk_errors
from experiment.files import read_items
from experiment.local_server import allowed_hosts, bind, unusable
from experiment.models.model_names import local_model
from experiment.process.daemon_thread import in_daemon_thread
from experiment.process.hardware import prepare_process
from experiment.process.own_process import raise_limit_of_open_files
from experiment.progress import quiet, terminal
from finetune.options import ServeOptions
from finetune.serve.admission import Limits
from finetune.serve.app import make_app
from finetune.serve.monitoring import log_as_json, log_event
from finetune.serve.served_model import ServedModel, load_served_model
from finetune.serve.serving_state import ServingState

TOKEN_VARIABLE = "DEEPCLOZE_SERVE_TOKEN"

_HEADER_SECONDS = 10.0  # for the headers of a request, from its first byte
# Until a connection without requests, or without progress of an answer, is closed. Most load balancers keep theirs for
# 60 s; one that is closed here first may have taken a request, and fails it.
_IDLE_SECONDS = 75
_BACKLOG = 2048  # connections that the system keeps until they are accepted
_ACCEPTS = 1  # per event; asyncio retries and logs an error for each one if no file descriptor is free
_DRAIN_SECONDS = 1.0
_CLOSE = (b"connection", b"close")


def serve_command(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError."""
    token = read_token(options.token_file, os.environ)
    if options.max_queue < options.max_texts:
        raise UserError(f"--max_queue: {options.max_queue} is less than the texts of one request, {options.max_texts}")
    wanted: list[int] = []  # signals that came before the server could reload; the default is to end the process
    if not _ignores_sighup():
        signal.signal(signal.SIGHUP, lambda number, _: wanted.append(number))

    def load() -> ServedModel:
        with readable_disk_errors():
            return load_served_model(local_model(options.model, onnx=True), options.precision)

    with bind(options.host, options.port) as listener, ExitStack() as stack:
        address, port = listener.getsockname()[:2]
        hosts = allowed_hosts(options.allowed_hosts, address)
        prepare_process()
        raise_limit_of_open_files()
        if terminal().is_interactive:
            terminal().print(f"loading {options.model}")
        else:  # stderr is a log
            stack.enter_context(_json_lines())
        first = in_daemon_thread(load, "load").result()
        stack.enter_context(_json_lines())
        limits = Limits(options.max_texts, options.max_request_kib * 1024, options.max_queue, options.timeout)
        state = ServingState(first, load, limits, options.batch_delay_ms / 1000, options.batch_tokens)
        del first  # it is freed when it is replaced
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        if token is None and not ip_address(address).is_loopback:
            log_event("any client that reaches this address may send requests: there is no token", logging.WARNING)

        def announce() -> None:
            served = state.served
            with suppress(OSError):  # a full disk; without this line the server answers all the same
                print(f"{url}  {served.loaded.folder} ({served.info.kind}, {served.info.precision})")
            if wanted:
                state.reload()

        run_server(make_app(state, token, hosts), listener, options.timeout, announce, state.reload)


@contextmanager
def _json_lines() -> Iterator[None]:
    """Write only JSON lines to stderr, and no progress bars."""
    handler = log_as_json()
    try:
        with quiet():
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def _ignores_sighup() -> bool:
    """Return whether SIGHUP is ignored, as under nohup: it then comes from a terminal that closes."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def read_token(path: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the token of a file, or else of the environment. Raises UserError for one that clients cannot send."""
    if path is None:
        token, origin = environment.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        token, origin = "\n".join(line for _, line in read_items(path, "--token_file")), path
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{origin}: expected a token of printable ASCII characters without spaces")
    return token


class _Protocol(H11Protocol):
    """Closes connections whose clients send no first request, are slow to send the headers of one, or do not read
    their answer, all of which uvicorn waits for forever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def _expect_headers(self) -> None:
        """Start the clock while there is no request, unless it runs already."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEADER_SECONDS, self.timeout_keep_alive_handler)

    def _expect_reading(self, unread: int = 0) -> None:
        """Drop the client if it has read nothing since `unread` bytes were left; look again later if some are left."""
        if left := self.transport.get_write_buffer_size():
            if left == unread:
                self.transport.abort()  # `close` would wait for the client
            else:
                self.loop.call_later(self.timeout_keep_alive, self._expect_reading, left)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    """Stops when its clients know: after a signal, answers say that the connection will be closed. uvicorn would close
    idle ones at once, and a client that sends its next request at that moment would get no answer."""

    _drained_at: float | None = None  # when connections that are still idle are closed; None: no signal has come

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None], on_reload: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started, self._on_reload = on_started, on_reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # asyncio has set it to `_ACCEPTS`
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and Ctrl-C, reload the model on SIGHUP. uvicorn's own would end with the signal."""
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop}
        if not _ignores_sighup():
            handlers[signal.SIGHUP] = self._on_reload
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        """Accept nothing more, and finish accepted requests; the second time, do not wait for them."""
        if self._drained_at is not None:
            self.force_exit = self.should_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # has tracebacks of all that the event loop cancels
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # otherwise uvicorn waits for them, since Python 3.12
            return
        self._drained_at = time.monotonic() + _DRAIN_SECONDS
        for server in self.servers:
            server.close()
        self.config.encoded_headers.append(_CLOSE)  # of further requests, and of those that are being answered:
        self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        for connection in self.server_state.connections:
            if (cycle := getattr(connection, "cycle", None)) is not None:
                cycle.default_headers = self.server_state.default_headers

    async def on_tick(self, counter: int) -> bool:
        if self._drained_at is not None:
            self.should_exit |= not self.server_state.connections or time.monotonic() > self._drained_at
        return await super().on_tick(counter)


def run_server(
    app: ASGIApp, listener: socket.socket, grace: float, on_started: Callable[[], None], on_reload: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the requests that were accepted, for at most `grace` seconds.

    Raises UserError if another server has taken the port in the meantime.
    """
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
    config = uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="on",
        backlog=_ACCEPTS,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=round(grace + 1),
        **options,
    )
    host, port = listener.getsockname()[:2]
    try:
        _Server(config, on_started, on_reload).run([listener])
    except OSError as error:
        raise unusable(host, port, error) from None
