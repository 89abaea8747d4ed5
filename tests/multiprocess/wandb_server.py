"""Servers in the place of Weights & Biases': one that works, for what deepcloze uses of it, and broken ones."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ENTITY = {"id": "e", "name": "someone"}


@dataclass
class FakeServer:
    """Keeps what it is sent. It has one run. It may break at any time."""

    url: str = ""
    status: int = 200  # of every answer
    answering: threading.Event = field(default_factory=threading.Event)  # while it is not set, requests wait
    history: list[dict[str, Any]] = field(default_factory=list)  # rows, as they arrived
    alerts: list[dict[str, Any]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)  # of GraphQL, by name
    names: list[str] = field(default_factory=list)  # that the run is given
    tags: list[str] = field(default_factory=list)  # too
    exit_codes: list[int] = field(default_factory=list)
    preempting: bool = False
    inserted: bool = False

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL request."""
        self.operations.append(operation)
        project = {"id": "p", "name": "deepcloze", "entity": _ENTITY}
        match operation:
            case "UpsertBucket":
                first, self.inserted = not self.inserted, True
                self.names += filter(None, [variables.get("displayName")])
                self.tags += variables.get("tags") or []
                bucket = {"id": "b", "name": variables.get("name"), "displayName": "run", "project": project}
                return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": first}}
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self._bucket() if self.inserted else None}}
            case "CreateRunFiles":
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
            case "NotifyScriptableRunAlert":
                self.alerts.append(variables)
                return {"notifyScriptableRunAlert": {"success": True}}
            case "Viewer":
                return {"viewer": {"id": "v", "entity": "someone", "username": "someone", "teams": {"edges": []}}}
        return {}

    def _bucket(self) -> dict[str, Any]:
        tail = [json.dumps(row) for row in self.history[-1:]]
        return {
            "id": "b",
            "name": "run",
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, body: dict[str, Any]) -> None:
        """Take a part of a run's files."""
        part = body.get("files", {}).get("wandb-history.jsonl")
        if part is not None:
            del self.history[part["offset"] :]
            self.history += map(json.loads, part["content"])
        self.preempting |= body.get("preempting", False)
        if "exitcode" in body:
            self.exit_codes.append(body["exitcode"])


@contextmanager
def wandb_server(status: int = 200) -> Iterator[FakeServer]:
    """Serve while the block runs. `status`: of every answer."""
    server = FakeServer(status=status)
    server.answering.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(data) if data.startswith(b"{") and data.count(b"\n") <= 1 else {}
            server.answering.wait()
            answer: dict[str, Any] = {}
            if server.status == 200 and self.path == "/graphql":
                answer = {"data": server.answer(body.get("operationName", ""), body.get("variables") or {})}
            elif server.status == 200 and self.path.endswith("/file_stream"):
                server.stream(body)
            self._send(answer)

        def do_GET(self) -> None:
            self._send({})

        do_PUT = do_GET  # noqa: N815

        def _send(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Not on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.answering.set()
            listening.shutdown()


@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def dead_port() -> Iterator[str]:
    """A URL at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    yield f"http://127.0.0.1:{port}"
