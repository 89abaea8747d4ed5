"""A server that speaks the part of the Hugging Face Hub's interface that deepcloze uses, with faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Fault = Callable[["Handler"], bool]
"""Answers a request in place of the server, or returns False."""

_PLURAL = {"model": "models", "dataset": "datasets"}


def status(code: int, **headers: str) -> Fault:
    """Answer with this status."""

    def answer(handler: "Handler") -> bool:
        handler.answer(code, b"", headers)
        return True

    return answer


def cut(size: int) -> Fault:
    """Send this many bytes of a file, then cut the connection."""

    def answer(handler: "Handler") -> bool:
        if handler.command != "GET":
            return False
        handler.cut_after = size
        return False

    return answer


@dataclass
class Repository:
    """Files by commit, and commits by branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def push(self, files: Mapping[str, bytes]) -> str:
        """Commit exactly these files. Returns the commit."""
        commit = hashlib.sha1(repr([len(self.commits), sorted(files.items())]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches["main"] = commit
        return commit

    def push_folder(self, folder: Path, **more: bytes) -> str:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.push({**files, **{name.replace("__", "."): content for name, content in more.items()}})

    def find(self, revision: str) -> str | None:
        """The commit of a revision."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the main branch."""
        return self.commits[self.branches["main"]] if self.branches else {}


@dataclass
class HubServer:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)  # "models/org/name"
    requests: list[str] = field(default_factory=list)  # "GET /path"
    tokens: list[str] = field(default_factory=list)  # that came with requests
    blobs: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    faults: list[tuple[str, Fault]] = field(default_factory=list)  # for the next request whose path has the text
    on_request: Callable[[str], None] = lambda _: None

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories.setdefault(f"{_PLURAL[kind]}/{name}", Repository())

    def fault(self, path: str, *faults: Fault) -> None:
        """Apply one fault after the other to requests whose path contains the text."""
        self.faults += [(path, fault) for fault in faults]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    cut_after: int | None = None

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut_after, self.cut_after = self.cut_after, None
        self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self.close_connection = True

    def answer_json(self, value: Any, code: int = 200, **headers: str) -> None:
        self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def refuse(self, code: int, error: str) -> None:
        self.answer_json({"error": error}, code, X_Error_Code=error)

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), {name: values[0] for name, values in parse_qs(url.query).items()}
        if path == "/api/agent-harnesses":  # huggingface_hub asks once a day, before the first request of a process
            self.refuse(404, "EntryNotFound")
            return
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.on_request(path)
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append(token.removeprefix("Bearer "))
        for index, (part, fault) in enumerate(self.hub.faults):
            if part in path:
                del self.hub.faults[index]
                if fault(self):
                    return
                break
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                method(self, *found.groups())
                return
        self.refuse(404, f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _find(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """The repository and the commit; answers the request if there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.headers.get("Authorization")):
            self.refuse(401, "RepoNotFound")
            return None
        commit = repository.find(revision)
        if commit is None and repository.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return repository, commit or ""

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        if found := self._find(f"{kind}/{name}", revision or "main"):
            repository, commit = found
            siblings = [{"rfilename": file} for file in repository.commits.get(commit, {})]
            self.answer_json({"_id": name, "id": name, "sha": commit, "tags": [], "siblings": siblings})

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        """Of repositories without folders."""
        if folder:
            self.refuse(404, "EntryNotFound")
        elif found := self._find(f"{kind}/{name}", revision):
            self.answer_json(_describe(found[0].commits.get(found[1], {})))

    def paths(self, kind: str, name: str, revision: str) -> None:
        if found := self._find(f"{kind}/{name}", revision):
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            files = found[0].commits.get(found[1], {})
            self.answer_json(_describe({path: content for path, content in files.items() if path in wanted}))

    def file(self, name: str, revision: str, path: str) -> None:
        kind, name = ("datasets", name[9:]) if name.startswith("datasets/") else ("models", name)
        if not (found := self._find(f"{kind}/{name}", revision)):
            return
        repository, commit = found
        if repository.gated and not self.headers.get("Authorization"):
            self.refuse(403, "GatedRepo")
        elif path not in repository.commits[commit]:
            self.refuse(404, "EntryNotFound")
        else:
            content = repository.commits[commit][path]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206 if start else 200, content[start:], headers)

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if f"models/{name}" in self.hub.repositories:
            self.answer_json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repository(name).private = private
        self.answer_json({"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, name: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in files
        ]
        self.answer_json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def lfs(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        actions = [
            {**found, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{found['oid']}", "header": {}}}}
            for found in objects
        ]
        self.answer_json({"transfer": "basic", "objects": actions})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.answer(200)

    def commit(self, name: str) -> None:
        repository = self.hub.repository(name)
        files = dict(repository.files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.push(files)
        self.answer_json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def valid(self) -> None:
        self.answer_json({"errors": [], "warnings": []})


def _describe(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ]


_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/(models|datasets)/(.+)/revision/(.+)", Handler.info),
    (r"GET /api/(models|datasets)/(.+)/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (r"POST /api/(models|datasets)/(.+)/paths-info/([^/]+)", Handler.paths),
    (r"POST /api/models/(.+)/preupload/main", Handler.preupload),
    (r"POST /api/models/(.+)/commit/main", Handler.commit),
    (r"GET /api/(models|datasets)/(.+)", Handler.info),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.valid),
    (r"POST /(.+)\.git/info/lfs/objects/batch", Handler.lfs),
    (r"PUT /lfs/(\w+)", Handler.put),
    (r"(?:GET|HEAD) /(.+)/resolve/([^/]+)/(.+)", Handler.file),
]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server without repositories."""
    handler = type("HubHandler", (Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.hub = HubServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield handler.hub
        server.shutdown()
        thread.join()


def use_hub(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let huggingface_hub in this process use a server and a cache folder. It reads its environment when it is
    imported."""
    from huggingface_hub import constants

    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    patch.delenv("HF_TOKEN", raising=False)


def use_hub_for_data(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """As `use_hub`, for the library datasets."""
    import datasets
    from huggingface_hub import HfFileSystem

    values = {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": f"{url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}",
        "HF_DATASETS_CACHE": cache,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        patch.setattr(datasets.config, name, value)
    HfFileSystem.clear_instance_cache()  # of another test's server
