"""Options of `deepcloze serve`, and mistakes that end it before it serves. Real processes: tests/multiprocess."""

import asyncio
import errno
import gc
import io
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.testclient import TestClient
from uvicorn.server import ServerState

from experiment.errors import UserError, is_quiet
from finetune.options import ServeOptions
from finetune.serve import server
from finetune.serve.admission import Limits
from finetune.serve.app import make_app
from finetune.serve.served_model import ServedModel, load_served_model
from finetune.serve.server import TOKEN_VARIABLE, read_token
from finetune.serve.serving_state import ServingState
from launcher.cli import main
from waiting import LIMIT, wait_until


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the log of this process to pytest."""
    monkeypatch.setattr(server, "log_as_json", logging.NullHandler)


@pytest.fixture
def taken_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such folder, and no such model in "),
        (["--model", "."], ". is neither a Hugging Face folder, a checkpoint nor a run with"),
        (["--model", "{encoder}", "--precision", "fp16"], "--precision: fp16 needs a CUDA device"),
        (["--model", "{encoder}", "--port", "70000"], "--port: expected"),
        (["--model", "{encoder}", "--port", "http"], "--port: expected"),
        (
            ["--model", "{encoder}", "--port", "{port}"],
            "--port: cannot listen on 127.0.0.1:{port}: Address already in use",
        ),
        (["--model", "{encoder}", "--host", "no host"], "--host: cannot listen on 'no host'"),
        (["--model", "{encoder}", "--token", "secret"], "unknown flag '--token'; did you mean '--token_file'?"),
        (["--model", "{encoder}", "--token_file", "nowhere"], "--token_file: cannot read nowhere"),
        (["--model", "{encoder}", "--max_queue", "10"], "--max_queue: 10 is less than the texts of one request, 1024"),
        ([], "missing: --model DIR"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(
    flags: list[str],
    message: str,
    encoder: Path,
    taken_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, a server that starts anyway, and a model that is loaded before the mistake is found."""
    monkeypatch.chdir(tmp_path)
    argv = ["serve", "--port", "0", *(flag.format(encoder=encoder, port=taken_port) for flag in flags)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"deepcloze: {message.format(port=taken_port)}")
    assert len(error.splitlines()) == 1


def test_a_model_without_a_head(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches predictions of a random head."""
    from transformers import BertConfig, BertModel

    BertModel(BertConfig.from_pretrained(encoder)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text((encoder / "vocab.txt").read_text())
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    assert "architecture: BertModel" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where only deepcloze itself is installed."""
    for module in [name for name in sys.modules if name.startswith("finetune.serve")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--model", "anything"]) == 2
    assert "fastapi is not installed; run: pip install 'deepcloze[serve]'" in capsys.readouterr().err


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    """Catches a token with the line end or the byte order mark of its file, and one in the command line, which other
    users can read."""
    path = tmp_path / "token"
    path.write_bytes(b"\xef\xbb\xbffrom-file\r\n")
    assert read_token(str(path), {TOKEN_VARIABLE: "from-environment"}) == "from-file"
    assert read_token(None, {TOKEN_VARIABLE: "from-environment"}) == "from-environment"
    assert read_token(None, {}) is None


@pytest.mark.parametrize("token", ["", "\n", "two words", "é", "a\nb"])
def test_a_token_that_cannot_be_sent(token: str, tmp_path: Path) -> None:
    """Catches an empty file that permits everyone, or no one."""
    path = tmp_path / "token"
    path.write_text(token)
    with pytest.raises(UserError, match="expected a token of printable ASCII characters"):
        read_token(str(path), {})


class Served:
    info = SimpleNamespace(kind="classification", precision="fp32")
    loaded = SimpleNamespace(folder="m")


def test_a_full_disk_keeps_no_server_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that ends because its first line does not fit into a log file, and blames the port."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server, "load_served_model", lambda *_: Served())
    monkeypatch.setattr(server, "ServingState", lambda served, *_: SimpleNamespace(served=served, reload=None))
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "run_server", lambda app, listener, timeout, announce, reload: announce())
    monkeypatch.setattr(sys, "stdout", Full())
    server.serve_command(ServeOptions(model=str(tmp_path), port=0))


def test_a_reload_prints_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line in the log that is not JSON, about a download from the Hub."""
    printed = []
    monkeypatch.setattr(server, "load_served_model", lambda *_: Served())
    monkeypatch.setattr(server, "ServingState", lambda served, *_: SimpleNamespace(served=served, reload=None))
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "run_server", lambda *_: printed.append(not is_quiet()))
    server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    assert printed == [False]


def test_a_reload_that_may_not_read_the_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a log with a traceback in place of the file and the reason."""
    weights = tmp_path / "model.safetensors"
    models: Iterator[Served | Exception] = iter([Served(), PermissionError(errno.EACCES, "denied", str(weights))])

    def make_state(served: Served, load: Callable[[], object], *_: object) -> SimpleNamespace:
        with pytest.raises(UserError, match=f"^{re.escape(str(weights))}: Permission denied$"):
            load()
        return SimpleNamespace(served=served, reload=None)

    monkeypatch.setattr(server, "load_served_model", Mock(side_effect=models))
    monkeypatch.setattr(server, "ServingState", make_state)
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "run_server", lambda *_: None)
    server.serve_command(ServeOptions(model=str(tmp_path), port=0))


def test_the_thread_that_loads_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second team of OpenMP's threads that stays, beside which the threads that answer never spin: a third
    of the speed is lost."""
    loading: list[threading.Thread] = []

    def load(*_: object) -> Served:
        loading.append(threading.current_thread())
        raise UserError("no model")

    monkeypatch.setattr(server, "load_served_model", load)
    with pytest.raises(UserError, match="no model"):
        server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    (thread,) = loading
    assert thread is not threading.main_thread()
    wait_until(lambda: not thread.is_alive())


@pytest.mark.parametrize(
    ("interactive", "expected"),
    [(True, ["loading {model}", "load, quiet: False"]), (False, ["JSON from now on", "load, quiet: True"])],
)
def test_a_terminal_shows_what_is_loaded(
    interactive: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches silence while a large model is loaded; and a line in a log that is JSON otherwise, such as a warning
    about the model."""
    events: list[str] = []

    def load(*_: object) -> Served:
        events.append(f"load, quiet: {is_quiet()}")
        raise UserError("no model")

    def log_as_json() -> logging.Handler:
        events.append("JSON from now on")
        return logging.NullHandler()

    monkeypatch.setattr(server, "load_served_model", load)
    monkeypatch.setattr(server, "log_as_json", log_as_json)
    monkeypatch.setattr(server, "terminal", lambda: SimpleNamespace(is_interactive=interactive, print=events.append))
    with pytest.raises(UserError, match="no model"):
        server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    assert events == [line.format(model=tmp_path) for line in expected]


def test_ctrl_c_ends_a_server_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a Ctrl-C that waits until the model is loaded, which may have to be downloaded."""
    downloaded = threading.Event()

    def load(*_: object) -> Served:
        os.kill(os.getpid(), signal.SIGINT)
        downloaded.wait(LIMIT)
        return Served()

    monkeypatch.setattr(server, "load_served_model", load)
    with pytest.raises(KeyboardInterrupt):
        server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    downloaded.set()


def test_a_server_that_reloads_ends(folders: dict[str, Path]) -> None:
    """Catches SIGTERM that waits for a reload, until the server is killed."""
    first, begun, downloaded = load_served_model(folders["sequence"], "fp32"), threading.Event(), threading.Event()

    def load() -> ServedModel:
        begun.set()
        downloaded.wait(LIMIT)
        return first

    state = ServingState(first, load, Limits(64, 1024, 64, 60.0), 0.001)
    with TestClient(make_app(state, None)) as client:
        client.portal.call(state.reload)
        assert begun.wait(LIMIT)
    downloaded.set()


@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
def test_clients_that_do_not_read_their_answer_are_dropped(connection: bytes) -> None:
    """Catches answers of megabytes that stay in memory until the server ends, with their connections."""
    state = ServerState()
    answer = Response(b"a" * 2**25)  # more than the system takes
    config = uvicorn.Config(answer, http=server._Protocol, lifespan="off", log_config=None, timeout_keep_alive=1)
    config.load()

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: server._Protocol(config, state, {}, loop), "127.0.0.1", 0)
        with socket.create_connection(listening.sockets[0].getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: %b\r\n\r\n" % connection)
            async with asyncio.timeout(LIMIT):
                while not state.total_requests or state.connections:
                    await asyncio.sleep(0.01)
        listening.close()

    asyncio.run(ask())


def test_new_connections_may_be_idle_as_long_as_others() -> None:
    """Catches a balancer that loses requests on the connections that it has opened in advance; and one without a
    request that stays open."""
    timers: list[Mock] = []

    def call_later(seconds: float, *_: object) -> Mock:
        timers.append(Mock(seconds=seconds))
        return timers[-1]

    config = uvicorn.Config(Response(), log_config=None, timeout_keep_alive=75)
    protocol = server._Protocol(config, ServerState(), {}, SimpleNamespace(call_later=call_later))
    protocol.connection_made(SimpleNamespace(get_extra_info=lambda _: None))
    assert [timer.seconds for timer in timers] == [75]
    for part in (b"G", b"ET"):
        protocol.data_received(part)
    assert [timer.seconds for timer in timers] == [75, 10]
    timers[0].cancel.assert_called_once_with()


@pytest.mark.parametrize(("unread", "aborted"), [([9, 5, 5], [True]), ([9, 5, 4, 0], [])])
def test_clients_that_read_slowly_get_their_answer(unread: list[int], aborted: list[bool]) -> None:
    """Catches an answer that is cut because it takes long."""
    sizes, calls = iter(unread), []
    protocol = server._Protocol.__new__(server._Protocol)
    protocol.transport = SimpleNamespace(get_write_buffer_size=lambda: next(sizes), abort=lambda: calls.append(True))
    protocol.loop = SimpleNamespace(call_later=lambda _, function, *arguments: function(*arguments))
    protocol.timeout_keep_alive = 1
    protocol._expect_reading()
    assert (calls, list(sizes)) == (aborted, [])


def test_the_limit_of_open_files_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thousand idle connections that keep all other clients out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(server, "load_served_model", lambda *_: Served())
    monkeypatch.setattr(server, "ServingState", lambda served, *_: SimpleNamespace(served=served, reload=None))
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "run_server", lambda *_: found.append(resource.getrlimit(resource.RLIMIT_NOFILE)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    try:
        server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [(hard, hard)]


def test_a_server_without_free_file_descriptors_logs_little() -> None:
    """Catches megabytes of log a second; and a short queue, in which the clients of a burst wait for seconds."""

    class Full(socket.socket):
        def __init__(self) -> None:
            super().__init__()
            self.accepts, self.backlog = 0, 0

        def listen(self, backlog: int) -> None:
            self.backlog = backlog
            super().listen(backlog)

        def accept(self) -> tuple[socket.socket, Any]:
            self.accepts += 1
            signal.raise_signal(signal.SIGTERM)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Full() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        connect = partial(client.connect, listener.getsockname())
        server.run_server(Starlette(), listener, 1.0, connect, lambda: None)
        assert listener.accepts in (1, 2)  # some versions of asyncio try once more
        assert listener.backlog == 2048


def test_a_closed_terminal_reloads_no_server_under_nohup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches SIGHUP of a terminal that reloads the model, though nohup says that it means nothing."""
    reloads: list[None] = []

    def hang_up(*_: object) -> Served:
        os.kill(os.getpid(), signal.SIGHUP)
        return Served()

    def run(app: object, listener: object, timeout: object, announce: Callable[[], None], reload: object) -> None:
        announce()

        async def serve() -> None:
            with server._Server(uvicorn.Config(Response()), announce, lambda: reloads.append(None)).capture_signals():
                hang_up()
                for _ in range(3):
                    await asyncio.sleep(0)

        asyncio.run(serve())

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(server, "load_served_model", hang_up)
    monkeypatch.setattr(
        server, "ServingState", lambda served, *_: SimpleNamespace(served=served, reload=lambda: reloads.append(None))
    )
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "run_server", run)
    server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    assert reloads == []


def test_reloads_while_the_server_starts_and_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches SIGHUP, such as from `systemctl reload`, ending a server that is still loading its model; and a replaced
    model whose memory is not freed."""
    first: list[weakref.ref[Served]] = []
    state = SimpleNamespace(reloads=0)

    def load(*_: object) -> Served:
        os.kill(os.getpid(), signal.SIGHUP)
        served = Served()
        first.append(weakref.ref(served))
        return served

    def make_state(served: Served, *_: object) -> SimpleNamespace:
        state.served = served
        state.reload = lambda: setattr(state, "reloads", state.reloads + 1)
        return state

    def run(app: object, listener: object, timeout: object, announce: Callable[[], None], reload: object) -> None:
        announce()
        state.served = Served()
        wait_until(
            lambda: gc.collect() is not None and first[0]() is None
        )  # the thread that loaded may hold it a moment

    monkeypatch.setattr(server, "load_served_model", load)
    monkeypatch.setattr(server, "ServingState", make_state)
    monkeypatch.setattr(server, "make_app", lambda *_: None)
    monkeypatch.setattr(server, "run_server", run)
    server.serve_command(ServeOptions(model=str(tmp_path), port=0))
    assert state.reloads == 1
