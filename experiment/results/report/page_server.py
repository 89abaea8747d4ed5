"""`deepcloze report --follow`: serve the pages of runs on this machine."""

import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from experiment.local_server import LOCAL_HOSTS, bind, host_name
from experiment.process.signals import handle_stop_signals, interrupt
from experiment.results.report.followed_pages import FollowedPage, FollowedPages
from experiment.run_files.run_folder import open_folder

_ADDRESS = "127.0.0.1"
_IDLE_SECONDS = 60.0  # until a connection without requests is closed
_RUN = "/run/"


def follow_runs(runs: Sequence[str], port: int) -> None:
    """Serve the pages until Ctrl-C or SIGTERM. Raises UserError if a folder does not exist, or the port cannot be
    used."""
    folders = [run for run in dict.fromkeys(runs) if not Path(run).is_file()]  # of a pattern such as runs/*
    pages = FollowedPages([open_folder(run) for run in folders or runs])
    with handle_stop_signals(interrupt), bind(_ADDRESS, port) as listener, PageServer(listener, pages) as server:
        print(f"http://{_ADDRESS}:{listener.getsockname()[1]}/  Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class PageServer(ThreadingHTTPServer):
    """Answers with pages: at / with the first one, at /run/NAME with the page of a run."""

    def __init__(self, listener: socket, pages: FollowedPages) -> None:
        """listener: bound to an address of this machine."""
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.pages = pages
        self.socket.close()
        self.socket = listener
        self.server_activate()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore that a browser has gone, which is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "deepcloze", ""
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if host_name(self.headers.get("Host", "").lower()) not in LOCAL_HOSTS:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this server answers to localhost only\n")
        elif url.path == "/favicon.ico":
            self._answer(HTTPStatus.NO_CONTENT, "image/x-icon", b"")
        elif (page := self._page(url.path)) is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
        elif since := parse_qs(url.query).get("since"):
            version = int(since[0][:18]) if since[0].isdecimal() else -1
            self._answer(HTTPStatus.OK, "application/json", page.changes(version))
        else:
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page.html())

    def _page(self, path: str) -> FollowedPage | None:
        name = unquote(path.removeprefix(_RUN)) if path.startswith(_RUN) else ""
        return self.server.pages.page(name) if name or path == "/" else None

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing per request."""
