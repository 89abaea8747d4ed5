"""A server on a simulated GPU answers as one on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
from serving_clients import WORDS, Connect

from simulated_gpu.gpu import simulated_gpu

pytest.importorskip("triton", reason="the simulated GPU needs Triton")

TEXTS = [" ".join(WORDS[start:stop]) for start, stop in ((0, 9), (3, 4), (7, 30))]
MASKED = "word1 [MASK] word2"
REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("sequence", "/v1/predict", {"texts": TEXTS}),
    ("token", "/v1/predict", {"records": [{"words": TEXTS[0].split()}]}),
    ("choice", "/v1/predict", {"records": [{"question": "word1", "choices": ["word2", "word3 word4"]}]}),
    ("masked", "/v1/fill-mask", {"texts": [MASKED], "top_k": 3}),
    ("masked", "/v1/fill-mask", {"texts": [MASKED], "options": [[["word3", "word4"]]]}),
    ("masked", "/v1/embed", {"texts": TEXTS, "pooling": "mean"}),
    ("sequence", "/v1/embed", {"texts": TEXTS, "pooling": "cls"}),
]


def numbers(answer: str) -> list[float]:
    """All numbers with a fraction in a JSON text."""
    found: list[float] = []
    json.loads(answer, parse_float=lambda number: found.append(float(number)))
    return found


def test_a_gpu_answers_as_a_cpu_does(connect: Connect, folders: dict[str, Path]) -> None:
    """Catches inputs, weights and outputs on the wrong device, in the threads of a server."""

    def answers() -> list[str]:
        clients = {head: connect(folder) for head, folder in folders.items()}
        found = [clients[head].post(path, json=body) for head, path, body in REQUESTS]
        assert [answer.status_code for answer in found] == [200] * len(REQUESTS), [answer.text for answer in found]
        return [answer.text for answer in found]

    expected = answers()
    with simulated_gpu() as gpu:
        found = answers()
        assert gpu.waits, "nothing was computed there"
        assert (gpu.mixed, gpu.races) == ([], [])
    for answer, other in zip(found, expected, strict=True):
        assert numbers(answer) == pytest.approx(numbers(other), abs=1e-4)
        assert len(numbers(answer)) > 1
