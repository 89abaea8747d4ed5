"""`deepcloze serve` as a process of its own: signals, reloads, slow clients."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from rank_pool import ForkServer
from runs import soak
from waiting import LIMIT, wait_until

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"word{number}" for number in range(40)]
BODY = {"texts": ["word1 word2", "word3"]}


class Server:
    """A running `deepcloze serve`."""

    def __init__(self, folder: Path, model: Path, flags: tuple[str, ...], variables: Mapping[str, str]) -> None:
        self.log = folder / f"serve-{random.getrandbits(32):x}.log"
        command = [sys.executable, "-m", "launcher", "serve", "--model", str(model), "--port", "0", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_until(lambda: "http://" in self.output(), self.process)
        (found,) = re.findall(r"^http://127\.0\.0\.1:(\d+)", self.output(), re.MULTILINE)
        self.port = int(found)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


def post(connection: http.client.HTTPConnection, path: str = "/v1/predict", body: Any = BODY) -> tuple[int, Any]:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def get(server: Server, path: str) -> str:
    connection = server.connect()
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def save_model(folder: Path, labels: tuple[str, str] = ("no", "yes"), intermediate_size: int = 64) -> Path:
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=intermediate_size,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("classifier"))


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path, handed_over: Mapping[str, str]) -> Iterator[Serve]:
    """Starts servers: serve(folder, *flags)."""
    started: list[Server] = []

    def start(folder: Path, *flags: str) -> Server:
        started.append(Server(tmp_path, folder, flags, handed_over))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[Server]:
    """A server of tests that leave it as it is."""
    server = Server(tmp_path_factory.mktemp("shared"), model, (), fork_server.environment())
    yield server
    server.process.kill()
    server.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, *soak(signal.SIGINT)])
def test_a_signal_finishes_accepted_requests(number: int, model: Path, serve: Serve) -> None:
    """Catches requests that are dropped when a server stops, and another exit code than 0."""
    server = serve(model, "--max_texts", "4000", "--batch_tokens", "64", "--batch_delay_ms", "0")
    body = {"texts": ["word1 word2 word3"] * 2000}
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(post, server.connect(), body=body) for _ in range(2)]
        wait_until(lambda: "deepcloze_queue_texts 4000.0" in get(server, "/metrics"), server.process)
        assert server.stop(number) == 0
        for answer in answers:
            status, found = answer.result(LIMIT)
            assert status == 200
            assert len(found["predictions"]) == 2000
    with pytest.raises(ConnectionRefusedError):
        server.connect().connect()


def test_a_second_signal_does_not_wait_for_accepted_requests(model: Path, serve: Serve) -> None:
    """Catches tracebacks of requests that are cancelled, and of the application."""
    server = serve(model, "--max_texts", "4000", "--batch_tokens", "8", "--batch_delay_ms", "0")
    body = {"texts": ["word1 word2 word3"] * 4000}
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, server.connect(), body=body)
        wait_until(lambda: "deepcloze_queue_texts 4000.0" in get(server, "/metrics"), server.process)
        server.process.send_signal(signal.SIGTERM)
        assert server.stop(signal.SIGINT) == 0
        with pytest.raises((http.client.HTTPException, ConnectionError, json.JSONDecodeError)):
            answer.result(LIMIT)
    assert "Traceback" not in server.output()


def test_a_signal_closes_connections_of_active_clients_politely(model: Path, serve: Serve) -> None:
    """Catches clients of kept connections whose next request is reset instead of answered."""
    server = serve(model)
    started = threading.Barrier(9)

    def ask() -> str:
        connection = server.connect()
        assert post(connection)[0] == 200
        started.wait(LIMIT)
        while True:
            connection.request("POST", "/v1/predict", json.dumps(BODY), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200
            answer.read()
            if answer.getheader("Connection") == "close":
                return "told"

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask) for _ in range(8)]
        started.wait(LIMIT)
        assert server.stop() == 0
        assert [answer.result(LIMIT) for answer in asked] == ["told"] * 8


def test_work_for_a_client_that_has_gone_is_dropped(model: Path, serve: Serve) -> None:
    """Catches a core that computes for minutes what nobody waits for, while other clients wait."""
    server = serve(model, "--max_texts", "4000", "--batch_tokens", "64", "--batch_delay_ms", "0")
    connection = server.connect()
    connection.request("POST", "/v1/predict", json.dumps({"texts": ["word1 word2 word3"] * 4000}))
    wait_until(lambda: "deepcloze_queue_texts 4000.0" in get(server, "/metrics"), server.process)
    connection.close()
    wait_until(lambda: "deepcloze_queue_texts 0.0" in get(server, "/metrics"), server.process)
    assert '"status": 499' in server.output()
    assert post(server.connect())[0] == 200


def test_a_reload_drops_no_request(model: Path, tmp_path: Path, serve: Serve) -> None:
    """Catches a reload that answers with neither model, or with both in one answer, or never with the new one."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    server, stop = serve(folder), threading.Event()
    seen: list[set[str]] = []

    def ask() -> int:
        connection, count = server.connect(), 0
        while not stop.wait(0.01):
            status, found = post(connection)
            assert status == 200, found
            (labels,) = {frozenset(each["probabilities"]) for each in found["predictions"]}
            seen.append(set(labels))
            count += 1
        return count

    def reloads(result: str) -> int:
        found = re.search(rf'deepcloze_reloads_total{{result="{result}"}} (\d+)', get(server, "/metrics"))
        return int(found[1]) if found else 0

    with ThreadPoolExecutor(8) as threads:
        counts = [threads.submit(ask) for _ in range(4)]
        wait_until(lambda: len(seen) > 50, server.process)
        for number in (1, 2):
            save_model(folder, (f"no{number}", f"yes{number}"))
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda number=number: reloads("success") == number, server.process)
            wait_until(lambda number=number: {f"no{number}", f"yes{number}"} in seen[-8:], server.process)
        (folder / "config.json").write_text("{")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: reloads("failure") == 1, server.process)
        stop.set()
        assert sum(count.result(LIMIT) for count in counts) == len(seen)
    assert post(server.connect())[0] == 200
    assert server.stop() == 0
    assert "cannot read the model config" in server.output()
    assert "Traceback" not in server.output()


def test_a_reload_returns_the_memory_of_the_old_model(tmp_path: Path, serve: Serve) -> None:
    """Catches a process that keeps the memory of two models after a reload."""
    size = 2**27  # bytes of the weights, of which there is a packed copy too
    server = serve(save_model(tmp_path, intermediate_size=size // (4 * 4 * 32)))  # four matrices in fp32

    def memory() -> float:
        assert post(server.connect())[0] == 200
        (found,) = re.findall(r"^process_resident_memory_bytes (.*)", get(server, "/metrics"), re.MULTILINE)
        return float(found)

    before = memory()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: 'deepcloze_reloads_total{result="success"} 1.0' in get(server, "/metrics"), server.process)
    assert memory() < before + size / 2


def test_files_that_are_overwritten_do_not_change_the_model(model: Path, tmp_path: Path, serve: Serve) -> None:
    """Catches weights that stay mapped to their file: copying over it ends the process, or mixes two models."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    server = serve(folder)
    before = post(server.connect())
    (folder / "model.safetensors").write_bytes(b"")
    assert post(server.connect()) == before
    assert server.stop() == 0


def test_slow_clients_do_not_block_others(model: Path, serve: Serve) -> None:
    """Catches clients that hold a server by sending slowly: headers, or a body."""
    server = serve(model, "--timeout", "10")  # as for headers; a busy machine answers within it too
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) for _ in range(40)]
    for number, client in enumerate(slow):
        client.sendall(head if number % 2 else head + b'\r\n{"texts": ["word1')
    connection = server.connect()
    for _ in range(20):
        assert post(connection)[0] == 200
    assert slow[0].recv(1000).startswith(b"HTTP/1.1 408 ")
    assert slow[1].recv(1000) == b""  # closed: the headers did not arrive
    assert post(server.connect())[0] == 200
    assert server.stop() == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_request_is_answered_once_it_is_sent(chunked: bool, shared: Server) -> None:
    """Catches a connection that is reset while the client still sends, and the answer lost with it."""
    connection, body = shared.connect(), b" " * 20 * 2**20
    sent = (body[start : start + 2**16] for start in range(0, len(body), 2**16)) if chunked else body
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request("POST", "/v1/predict", sent, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read()) == {"error": "the request is larger than 1,024 KiB"}


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000], ids=range(3)
)
def test_what_is_not_http_gets_400(sent: bytes, shared: Server) -> None:
    """Catches a server that ends with, or waits for, a client that speaks another protocol."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=LIMIT) as client:
        client.sendall(sent)
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert post(shared.connect())[0] == 200


def test_the_log_is_json_without_texts(model: Path, serve: Serve) -> None:
    """Catches a log that shows what clients send, and lines that no log collector can parse."""
    server = serve(model)
    for path in ("/v1/predict?text=secret", "/secret", "/v1/fill-mask"):
        post(server.connect(), path, {"texts": ["secret"]})
    post(server.connect(), body={"texts": ["secret", 3]})
    assert server.stop() == 0
    lines = [line for line in server.output().splitlines() if not line.startswith("http://")]
    assert [json.loads(line)["message"] for line in lines] == ["request"] * 4
    assert "secret" not in server.output()


def test_two_servers_on_one_port(model: Path, shared: Server, handed_over: Mapping[str, str]) -> None:
    """Catches a traceback, or a second server that takes the requests of the first."""
    command = [sys.executable, "-m", "launcher", "serve", "--model", str(model), "--port", str(shared.port)]
    environ = os.environ | handed_over
    second = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environ)
    assert second.returncode == 2
    taken = f"deepcloze: --port: cannot listen on 127.0.0.1:{shared.port}: Address already in use"
    assert second.stderr == f"{taken}; --port 0 chooses a free one\n"


@pytest.mark.soak
@pytest.mark.real_start
def test_memory_stays_flat(model: Path, serve: Serve) -> None:
    """Catches a leak: of requests, of their texts, or of old models."""
    server, draw = serve(model), random.Random(0)
    process = psutil.Process(server.process.pid)

    def ask(requests: int) -> None:
        connection = server.connect()
        for _ in range(requests):
            texts = [" ".join(random.choices(WORDS, k=draw.randint(1, 60))) for _ in range(draw.randint(1, 4))]
            assert post(connection, body={"texts": texts})[0] == 200

    def ask_all() -> int:
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(ask, [250] * 16))
        return process.memory_info().rss

    first = ask_all()
    for _ in range(5):
        last = ask_all()
    assert last < first + 20 * 2**20


@pytest.fixture(scope="module")
def mask_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked LM with a vocabulary and positions as large as BERT's, on which the memory of an answer depends."""
    folder = tmp_path_factory.mktemp("masked")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(30_000))]
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertForMaskedLM(BertConfig(vocab_size=len(tokens), **shape)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


_MASKS = " ".join(["word1 [MASK]"] * 60)
_HEAVY: list[tuple[str, dict[str, Any]]] = [
    ("many candidates", {"texts": [_MASKS] * 200, "top_k": 1000}),
    ("as many candidates as are accepted", {"texts": [_MASKS] * 17, "top_k": 100}),
    ("many masks", {"texts": [_MASKS] * 1024, "top_k": 1}),
    ("many options", {"texts": ["word1 [MASK]"], "options": [[[f"word{n}" for n in range(20_000)]]]}),
    ("as many options as are accepted", {"texts": ["word1 [MASK]"], "options": [[[f"word{n}" for n in range(1024)]]]}),
    (
        "long options",
        {"texts": ["word1 " * 400 + "[MASK]"], "options": [[[f"word{n} " * 100 for n in range(1000)]]]},
    ),
    ("long texts", {"texts": ["word1 " * 500 + "[MASK]"] * 100, "top_k": 5}),
]


@pytest.mark.soak
@pytest.mark.real_start
def test_heavy_requests_leave_memory_and_other_clients_alone(mask_model: Path, serve: Serve) -> None:
    """Catches a request that takes gigabytes, so that the server is killed, and one that holds up others for minutes;
    also if clients leave without waiting for the answer."""
    server, stop = serve(mask_model), threading.Event()
    process = psutil.Process(server.process.pid)
    small = {"texts": ["word1 [MASK]"]}
    assert post(server.connect(), "/v1/fill-mask", small)[0] == 200
    before, peak, slowest = process.memory_info().rss, 0, 0.0

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    def ask_little() -> None:
        nonlocal slowest
        while not stop.is_set():
            start = time.monotonic()
            assert post(server.connect(), "/v1/fill-mask", small)[0] in (200, 503)
            slowest = max(slowest, time.monotonic() - start)

    def leave(body: dict[str, Any]) -> None:
        connection = server.connect()
        connection.request("POST", "/v1/fill-mask", json.dumps(body), {"Content-Type": "application/json"})
        connection.close()

    with ThreadPoolExecutor(12) as threads:
        watched = [threads.submit(watch), threads.submit(ask_little)]
        try:
            for name, body in _HEAVY:
                answers = [threads.submit(post, server.connect(), "/v1/fill-mask", body) for _ in range(4)]
                for _ in range(20):
                    leave(body)
                assert {answer.result(LIMIT)[0] for answer in answers} <= {200, 413, 503}, name
        finally:
            stop.set()
        for each in watched:
            each.result(LIMIT)
    assert peak < before + 2**29
    assert slowest < 30
    assert post(server.connect(), "/v1/fill-mask", small)[0] == 200
    assert server.stop() == 0
