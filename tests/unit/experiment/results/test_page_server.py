"""`deepcloze report --follow` over HTTP, in this process."""

import http.client
import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENT

from experiment.local_server import bind
from experiment.results.report.followed_pages import FollowedPages
from experiment.results.report.page_server import PageServer
from experiment.run_files.run_folder import RunFolder, open_run_folder
from launcher.cli import main
from waiting import wait_until


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = open_run_folder(tmp_path / "runs" / "a b")
    folder.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    return folder.path


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    with (
        bind("127.0.0.1", 0) as listener,
        PageServer(listener, FollowedPages([RunFolder(run.parent)], PATIENT)) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.headers)


def test_a_star_is_any_address() -> None:
    """Catches a server in a container that only the container itself can reach."""
    with bind("*", 0) as listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::")


def test_routes(port: int) -> None:
    """Catches pages that a browser keeps, that other sites can frame or read, and data that are no JSON."""
    status, text, headers = get(port, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert 'href="run/a%20b"' in text
    assert "connect-src 'self'" in text
    for path in ("/?since=0", "/run/a%20b?since=x", f"/?since={'9' * 5000}"):
        status, text, headers = get(port, path)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert json.loads(text)["parts"]
    assert get(port, "/favicon.ico")[0] == 204
    for path in ("/run/", "/run/c", "/run/..", "/run/%2Fetc", "/x", "/run"):
        assert get(port, path)[0] == 404, path


def test_a_connection_is_used_again(port: int) -> None:
    """Catches a new connection for each request, and an answer without its length."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(2):
        connection.request("GET", "/run/a%20b")
        assert b"a b" in connection.getresponse().read()
        assert connection.sock is not None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8001", "LOCALHOST:9", "[::1]:8001"])
def test_own_names(port: int, host: str) -> None:
    """Catches a server that cannot be reached through a tunnel."""
    assert get(port, "/", host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8001", "127.0.0.1.evil.example", ""])
def test_other_names(port: int, host: str) -> None:
    """Catches pages of other sites that read what runs have logged, by a name that they point at this machine."""
    for path in ("/", "/run/a%20b", "/?since=0"):
        status, text, _ = get(port, path, host)
        assert (status, text) == (421, "this server answers to localhost only\n"), host


def test_a_client_that_goes_away_is_no_error(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback on the terminal for each tab that is closed at the wrong moment."""
    others = threading.active_count()  # also of earlier tests
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))  # reset it
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert get(port, "/")[0] == 200
    wait_until(lambda: threading.active_count() <= others)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it(
    number: int, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an exit code for a server that was ended on purpose, a traceback, and one that waits for connections."""
    handlers = {number: signal.getsignal(number) for number in (*signal.Signals,)}
    answered = []

    def open_page(line: str, **_: object) -> None:
        def client() -> None:
            answered.append(urllib.request.urlopen(line.split()[0]).status)
            os.kill(os.getpid(), number)

        threading.Thread(target=client).start()

    monkeypatch.setattr("builtins.print", open_page)
    try:
        assert main(["report", str(run), "--follow", "--port=0"]) == 0
    finally:
        for restored, handler in handlers.items():
            if signal.getsignal(restored) is not handler:
                signal.signal(restored, handler)
    assert answered == [200]
    assert capsys.readouterr() == ("", "")


def test_mistakes_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a port that is taken, a folder that does not exist, and flags that exclude each other."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for argv, message in [
            ([str(run), f"--port={port}"], f"--port: cannot listen on 127.0.0.1:{port}: Address already in use"),
            ([f"{run}x"], f"there is no run folder {run}x"),
            ([str(run), "--output=x"], "--output and --follow exclude each other (deepcloze report --help)"),
            ([str(run), "--port=70000"], "--port: expected a whole number >= 0 and <= 65535"),
        ]:
            assert main(["report", *argv, "--follow"]) == 2
            printed = capsys.readouterr()
            assert (printed.out, printed.err.count("\n")) == ("", 1)
            assert printed.err.startswith(f"deepcloze: {message}"), printed.err
