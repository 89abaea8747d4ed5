"""A server with an ONNX model answers as one with the original."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_clients import WORDS, Connect
from starlette.testclient import TestClient

TEXTS = [" ".join(WORDS[start:stop]) for start, stop in ((0, 9), (3, 4), (7, 30), (0, 40))]
MASKED = {"texts": ["word1 [MASK] word2", "[MASK] word3 word4 [MASK]"]}


def post(client: TestClient, path: str, body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    (found,) = answer.json().values()
    return found


def assert_close(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    ("head", "requests"),
    [
        ("choice", {"/v1/predict": {"records": [{"question": TEXTS[0], "choices": TEXTS[1:]}]}}),
        ("masked", {"/v1/fill-mask": MASKED | {"top_k": 3}}),
    ],
)
def test_answers_are_the_same(
    head: str, requests: dict[str, Any], folders: dict[str, Path], export_onnx: Callable[..., Path], connect: Connect
) -> None:
    """Catches a route that needs what only PyTorch has, such as hooks in the output layer, or hidden states that have
    another shape."""
    exported = connect(export_onnx(folders[head]))
    original = connect(folders[head])
    requests = {**requests, "/v1/embed": {"texts": TEXTS, "pooling": "mean"}}
    if head == "masked":
        options = [[["word5", "word6 word7"]], [["word1", "word2"], ["word8", "word9"]]]
        assert_close(*(post(each, "/v1/fill-mask", MASKED | {"options": options}) for each in (exported, original)))
    for path, body in requests.items():
        assert_close(post(exported, path, body), post(original, path, body))
    infos = [client.get("/v1/model").json() for client in (exported, original)]
    assert [info.pop("model") for info in infos] == [str(exported.serving.served.loaded.folder), str(folders[head])]  # type: ignore[attr-defined]
    assert infos[0] | {"loaded": None} == infos[1] | {"loaded": None}
