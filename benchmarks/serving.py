"""Requests per second of `deepcloze serve` and of a plain server: FastAPI and a pipeline of transformers.

    python -m benchmarks.serving [--model DIR] [--clients 32] [--seconds 20] [--rounds 3] [--soak_requests 10000]

All serve the same sequence classifier, by default one of the size of BERT base with random weights, to clients on this
machine that send one text at a time and wait for its answer. The texts are as long as sentences of reviews: 3 to 60
words, half of them less than 20. The servers alternate, so that a slow minute of the machine affects all, and each is
started again for each round. The plain server is written as in tutorials: a FastAPI function that calls the pipeline,
in fp32. Prints requests per second, latencies, and the memory of `deepcloze serve` before and after many requests.
"""

import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fire
import numpy as np
import psutil

from benchmarks.measuring import deepcloze, describe_machine
from experiment.formatting import print_table

PLAIN = "FastAPI + pipeline"
PRECISIONS = {"fp32": "deepcloze serve, fp32", "bf16": "deepcloze serve, bf16", "int8": "deepcloze serve, ONNX int8"}
_PLAIN_PATH, _PATH = "/predict", "/v1/predict"
_WARM_UP = 64  # requests
_SHOWN = 4000  # characters of the log of a server that failed
_VOCABULARY = 20_000


@dataclass(frozen=True)
class Load:
    """Requests of the clients."""

    port: int
    path: str
    clients: int


def serving(
    model: str | None = None,
    *,
    clients: int = 32,
    seconds: float = 20.0,
    rounds: int = 3,
    soak_requests: int = 10_000,
    precisions: str = "fp32,bf16,int8",
) -> None:
    """Measure all and print a table."""
    chosen = {name: precision for precision, name in PRECISIONS.items() if precision in precisions}
    names = [PLAIN, *chosen]
    latencies: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    per_cpu_second: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as made:
        folder = model or _save_model(Path(made, "model"))
        if "int8" in chosen.values():
            deepcloze("export", "--checkpoint", folder, "--output", f"{made}/int8", "--format", "onnx", "--int8")
        folders = {name: f"{made}/int8" if chosen.get(name) == "int8" else folder for name in names}
        for _ in range(rounds):
            for name in names:
                with _server(folders[name], clients, chosen.get(name)) as (load, process):
                    _ask(load, lambda count, _: count >= _WARM_UP)
                    start, cpu = time.perf_counter(), _cpu_seconds(process)
                    found = _ask(load, lambda _, now, end=start + seconds: now > end)  # type: ignore[misc]
                    rates[name].append(len(found) / (time.perf_counter() - start))
                    per_cpu_second[name].append(len(found) / (_cpu_seconds(process) - cpu))
                    latencies[name] += found
        _print_table("requests/s", rates, latencies, clients)
        _print_table("requests per CPU-second", per_cpu_second, latencies, clients)
        print(describe_machine())
        if soak_requests:
            with _server(folders[names[-1]], clients, chosen.get(names[-1])) as (load, process):
                _soak(names[-1], load, process, soak_requests)


def _cpu_seconds(process: psutil.Process) -> float:
    """CPU time of all threads of a server: comparable even if other programs use the machine."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _print_table(unit: str, rates: dict[str, list[float]], latencies: dict[str, list[float]], clients: int) -> None:
    rows = []
    for name, found in rates.items():
        ratio = statistics.median(rate / plain for rate, plain in zip(found, rates[PLAIN], strict=True))
        percentiles = (f"{1000 * np.percentile(latencies[name], percent):,.0f}" for percent in (50, 95, 99))
        rows.append([name, f"{statistics.median(found):.1f}", f"{ratio:.2f} x", *percentiles])
    columns = ("", unit, "ratio", "p50 ms", "p95 ms", "p99 ms")
    print_table(columns, rows, title=f"{clients} clients, one text per request")


def _soak(name: str, load: Load, process: psutil.Process, requests: int) -> None:
    _ask(load, lambda count, _: count >= requests // 10)
    before = process.memory_info().rss
    _ask(load, lambda count, _: count >= requests)
    after = process.memory_info().rss
    print(f"{name}: memory {before / 2**20:,.0f} MiB before and {after / 2**20:,.0f} MiB after {requests:,} requests")


def _ask(load: Load, is_over: Callable[[int, float], bool]) -> list[float]:
    """Return the latencies of requests in seconds. is_over: of the number of requests so far, and the time."""
    latencies: list[float] = []

    def client(seed: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", load.port, timeout=300)
        draw = random.Random(seed)
        while not is_over(len(latencies), time.perf_counter()):
            body = json.dumps({"texts": [_text(draw)]})
            start = time.perf_counter()
            connection.request("POST", load.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            latencies.append(time.perf_counter() - start)

    with ThreadPoolExecutor(load.clients) as threads:
        list(threads.map(client, range(load.clients)))
    return latencies


def _text(draw: random.Random) -> str:
    words = min(60, max(3, round(draw.lognormvariate(2.9, 0.6))))
    return " ".join(f"w{draw.randrange(_VOCABULARY)}" for _ in range(words))


@contextmanager
def _server(folder: str, clients: int, precision: str | None) -> Iterator[tuple[Load, psutil.Process]]:
    """A server that runs, on a free port. precision: None for the plain one."""
    if precision is None:
        command = ["-m", "benchmarks.serving", "--contestant", folder]
    else:
        flag = "auto" if precision == "int8" else precision  # int8 is a property of the folder
        command = ["-m", "launcher", "serve", "--model", folder, "--port", "0", "--precision", flag]
    with tempfile.TemporaryFile("w+") as log:  # `deepcloze serve` logs each request
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended: {command}")
            port = int(line.split()[0].rpartition(":")[2])
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield Load(port, _PLAIN_PATH if precision is None else _PATH, clients), psutil.Process(process.pid)
        except Exception:
            log.seek(0)
            print(log.read()[-_SHOWN:], file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()


def serve_plainly(folder: str) -> None:
    """Run the plain server."""
    import socket

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import pipeline

    class Request(BaseModel):
        texts: list[str]

    classify = pipeline("text-classification", folder, device="cpu", top_k=None)
    app = FastAPI()

    @app.post(_PLAIN_PATH)
    def predict(request: Request) -> list[object]:
        return [classify(text) for text in request.texts]

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


def _save_model(folder: Path) -> str:
    """Return a classifier of the size of BERT base, with random weights and a vocabulary of words w0, w1, …"""
    from transformers import BertConfig, BertForSequenceClassification

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(_VOCABULARY))]
    BertForSequenceClassification(BertConfig(vocab_size=len(tokens))).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return str(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        serve_plainly(sys.argv[2])
    else:
        fire.Fire(serving)
