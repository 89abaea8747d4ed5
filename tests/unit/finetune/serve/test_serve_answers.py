"""Answers are those of transformers, alone and under load."""

import itertools
import random
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from serving_clients import WORDS, Connect
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from finetune.prediction import mask_filler
from finetune.prediction.loaded_model import load_model
from finetune.prediction.mask_filler import MaskFiller, ranking_task
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import TASK_FILE, find_model, override_task, read_saved_task, write_saved_task
from runs import soak

CLOSE = 1e-5

TEXTS = [" ".join(WORDS[start:stop]) for start, stop in ((0, 9), (3, 4), (7, 30), (0, 40))]
MASKED = {"texts": ["word1 [MASK] word2", "[MASK] word3 word4 [MASK]"]}

PATHS = ("/v1/predict", "/v1/fill-mask", "/v1/embed", "/v1/model_prediction/", "/v1/model", "/healthz", "/readyz")


def texts(count: int, longest: int = 30) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def post(client: TestClient, path: str, body: Any, **headers: str) -> Any:
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def probabilities(folder: Path, inputs: Sequence[Any]) -> list[dict[str, float]]:
    """Of transformers' pipeline, one by one."""
    classify = pipeline("text-classification", str(folder), device="cpu")
    found = [classify(each, top_k=None, truncation=True, max_length=64) for each in inputs]
    return [{each["label"]: each["score"] for each in row} for row in found]


def assert_same(predictions: Sequence[Any], expected: Sequence[dict[str, float]]) -> None:
    assert [prediction["probabilities"] for prediction in predictions] == [
        pytest.approx(each, abs=CLOSE) for each in expected
    ]
    assert [prediction["label"] for prediction in predictions] == [max(each, key=each.__getitem__) for each in expected]


def test_classification_of_texts_and_pairs(folders: dict[str, Path], clients: Callable[[str], TestClient]) -> None:
    """Catches labels that are not the model's, truncation or special tokens that differ, pairs as single texts, and
    records of one of them that are rejected."""
    client, given = clients("sequence"), [*texts(20), "word1 " * 200, ""]
    pairs = [[text, f"{text} word3"] for text in given]
    found = post(client, "/v1/predict", {"texts": given})["predictions"]
    assert_same(found, probabilities(folders["sequence"], given))
    found = post(client, "/v1/predict", {"pairs": pairs})["predictions"]
    records = [{"text": a, "text_pair": b} for a, b in pairs]
    assert_same(found, probabilities(folders["sequence"], records))
    mixed = [*records, {"text": "word1"}]
    assert_same(
        post(client, "/v1/predict", {"records": mixed})["predictions"], probabilities(folders["sequence"], mixed)
    )


def test_answers_under_load(folders: dict[str, Path], connect: Connect) -> None:
    """Catches answers that depend on the texts of other clients, or go to the wrong client, and wrong counts."""
    client, given = connect(folders["sequence"], batch_tokens=128), texts(120)
    expected = probabilities(folders["sequence"], given)
    sizes = [1, 2, 5, 1, 11] * 6
    parts = [slice(sum(sizes[:number]), sum(sizes[: number + 1])) for number in range(len(sizes))]

    def ask(part: slice) -> None:
        assert_same(post(client, "/v1/predict", {"texts": given[part]})["predictions"], expected[part])

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, parts))
    metrics = client.get("/metrics").text
    (batches,) = (line for line in metrics.splitlines() if line.startswith("deepcloze_batch_sequences_count"))
    assert float(batches.split()[1]) < 120
    assert 'deepcloze_requests_total{path="/v1/predict",status="200"} 30.0' in metrics
    assert 'deepcloze_texts_total{path="/v1/predict"} 120.0' in metrics


def test_filled_masks(folders: dict[str, Path], clients: Callable[[str], TestClient]) -> None:
    """Catches candidates of another position, without softmax, or in another order."""
    client = clients("masked")
    given = ["word1 [MASK] word2", "[MASK]", "word4 word5 [MASK] word6 [MASK] word7"]
    found = post(client, "/v1/fill-mask", {"texts": given, "top_k": 4})["predictions"]
    fill = pipeline("fill-mask", str(folders["masked"]), device="cpu", top_k=4)
    for text, masks in zip(given, found, strict=True):
        expected = fill(text)
        expected = expected if isinstance(expected[0], list) else [expected]
        assert [[each["token"] for each in mask] for mask in masks] == [
            [each["token_str"] for each in mask] for mask in expected
        ]
        for mask, other in zip(masks, expected, strict=True):
            assert [each["probability"] for each in mask] == pytest.approx([e["score"] for e in other], abs=CLOSE)


def test_many_masks(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches probabilities of all masks of a batch in memory at once, and candidates of another mask."""
    filler = MaskFiller(load_model(folders["masked"], ranking_task(), "fp32"))
    softmax, counts = torch.Tensor.softmax, []
    given = ["[MASK]", "word1 [MASK] word2 [MASK]", "[MASK] word3 [MASK]"]
    expected = filler.fill(given)
    monkeypatch.setattr(mask_filler, "_MASKS", 2)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda rows, *dim: counts.append(len(rows)) or softmax(rows, *dim))
    assert filler.fill(given) == expected
    assert counts == [2, 2, 1]


def test_ranked_options(folders: dict[str, Path], clients: Callable[[str], TestClient]) -> None:
    """Catches options of one token in another order than their probabilities, and options that belong to another mask.

    An underscore in the text is no blank.
    """
    client, text = clients("masked"), "word1 _ [MASK] word2 [MASK]"
    options = [["word3", "word4", "word5"], ["word6", "word7 word8"]]
    (found,) = post(client, "/v1/fill-mask", {"texts": [text], "options": [options]})["predictions"]
    fill = pipeline("fill-mask", str(folders["masked"]), device="cpu", targets=options[0])
    expected = {each["token_str"]: each["score"] for each in fill(text)[0]}
    total = sum(expected.values())
    assert [each["token"] for each in found[0]] == sorted(expected, key=lambda token: -expected[token])
    for each in found[0]:
        assert each["probability"] == pytest.approx(expected[each["token"]] / total, abs=CLOSE)
    assert {each["token"] for each in found[1]} == set(options[1])


def test_more_options_than_letters(clients: Callable[[str], TestClient]) -> None:
    """Catches an error in the server for more options than the letters from A to Z."""
    client, options = clients("masked"), [f"word{number}" for number in range(32)]
    request = {
        "texts": ["word1 [MASK]"] * 2,
        "options": [[options], [options[::-1]]],
    }  # the best is among the last in one
    for (found,) in post(client, "/v1/fill-mask", request)["predictions"]:
        assert {each["token"] for each in found} == set(options)


@pytest.mark.parametrize("head", ["sequence", "masked"])
def test_embeddings(head: str, folders: dict[str, Path], clients: Callable[[str], TestClient]) -> None:
    """Catches vectors that depend on padding, or are not those of the last layer."""
    client, given = clients(head), texts(12)
    model, tokenizer = AutoModel.from_pretrained(folders[head]), AutoTokenizer.from_pretrained(folders[head])
    with torch.no_grad():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in given]
    for pooling, expected in (
        ("mean", [rows.mean(0).tolist() for rows in hidden]),
        ("cls", [rows[0].tolist() for rows in hidden]),
    ):
        found = post(client, "/v1/embed", {"texts": given, "pooling": pooling})["embeddings"]
        assert found == [pytest.approx(each, abs=CLOSE) for each in expected]


@pytest.mark.parametrize(
    ("path", "head"), [("/v1/predict", "sequence"), ("/v1/embed", "sequence"), ("/v1/fill-mask", "masked")]
)
def test_answers_are_rendered_beside_the_event_loop(
    path: str, head: str, clients: Callable[[str], TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches probes and other clients that wait while a large answer is rendered: in the thread of the event loop, or
    at once, without letting other threads run."""
    client, rendered, threads = clients(head), [], []

    def render(response: JSONResponse, content: Any) -> bytes:
        rendered.append(content)
        threads.append(threading.current_thread())
        return original(response, content)

    original = JSONResponse.render
    monkeypatch.setattr(JSONResponse, "render", render)
    (found,) = post(client, path, {"texts": ["word1 [MASK]"] * 3}).values()
    assert found == rendered
    assert len(rendered) == 3
    assert client.portal.call(threading.current_thread) not in threads


def test_tags(folders: dict[str, Path], clients: Callable[[str], TestClient]) -> None:
    """Catches tags of other words, for a token classifier of transformers."""
    client, folder = clients("token"), folders["token"]
    words = [text.split() for text in texts(8)]
    found = post(client, "/v1/predict", {"records": [{"words": each} for each in words]})["predictions"]
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for each, prediction in zip(words, found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(each, is_split_into_words=True, return_tensors="pt")).logits[0, 1:-1]
        assert prediction["tags"] == [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
        assert prediction["scores"] == pytest.approx(logits.softmax(-1).max(-1).values.tolist(), abs=CLOSE)


def test_choices(folders: dict[str, Path], clients: Callable[[str], TestClient]) -> None:
    """Catches choices that are scored without their question, for a multiple-choice model of transformers."""
    client, folder = clients("choice"), folders["choice"]
    question, choices = "word1 word2", ["word3", "word4 word5", "word6"]
    (found,) = post(client, "/v1/predict", {"records": [{"question": question, "choices": choices}]})["predictions"]
    model, tokenizer = AutoModelForMultipleChoice.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([question] * 3, choices, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**{name: tensor[None] for name, tensor in inputs.items()}).logits[0]
    assert found["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=CLOSE)
    assert found["label"] == choices[int(logits.argmax())]


def test_a_finetuned_model_answers_as_predict(trained_run: Path, connect: Connect) -> None:
    """Catches a server that tokenizes, cuts or calibrates in its own way, and a run whose best seed is not found."""
    client = connect(trained_run)
    folder = client.state.served.loaded.folder  # type: ignore[attr-defined]
    assert folder.parent.parent == trained_run
    assert client.get("/v1/model").json()["model"] == "model", "without the folders above it"
    predictor, given = Predictor.load(folder, "fp32"), texts(30)
    for calibrated in (False, True):
        found = post(client, "/v1/predict", {"texts": given, "calibrated": calibrated})["predictions"]
        assert_same(
            found, [each["probabilities"] for each in predictor.predict([{"text": text} for text in given], calibrated)]
        )


def test_a_model_says_that_it_expects_dialogues(trained_run: Path, connect: Connect, tmp_path: Path) -> None:
    """Catches clients that cannot know that a text has the turns before it, and how they are separated."""
    model, _ = find_model(trained_run)
    shutil.copytree(model, folder := tmp_path / "model")
    task = read_saved_task(folder)
    dialogue = {"dialogue.group": "scene", "special_tokens_in_text": "true"}
    (folder / TASK_FILE).unlink()
    write_saved_task(folder, override_task(task, dialogue))
    fields = connect(folder).get("/v1/model").json()["fields"]
    assert fields == {"text": "text, after the previous turns of its dialogue, with [SEP] after each of them"}
    assert connect(model).get("/v1/model").json()["fields"] == {"text": "text"}


@pytest.mark.parametrize(("send", "slash"), [("json", "/"), ("json", ""), ("data", "/"), ("files", "/")])
def test_label_and_score_for_older_clients(
    send: str, slash: str, folders: dict[str, Path], clients: Callable[[str], TestClient]
) -> None:
    """Catches an answer that older clients cannot parse: a list, for JSON and both kinds of forms; and a path without
    its last slash that clients must follow a redirect for."""
    client = clients("sequence")
    fields: Any = {"sentence1": "word1", "sentence2": "word2"}
    given = {name: (None, text) for name, text in fields.items()} if send == "files" else fields
    answer = client.post(f"/v1/model_prediction{slash}", follow_redirects=False, **{send: given})
    label, score = answer.json()
    (expected,) = probabilities(folders["sequence"], [{"text": "word1", "text_pair": "word2"}])
    assert score == pytest.approx(expected[label], abs=CLOSE)
    label, score = client.post("/v1/model_prediction/", json={"sentence1": "word1", "sentence2": ""}).json()
    assert score == pytest.approx(probabilities(folders["sequence"], ["word1"])[0][label], abs=CLOSE)


@pytest.mark.parametrize("quote", [str, urllib.parse.quote_plus])  # as curl -d and --data-urlencode send it
def test_text_of_a_form_in_utf_8(quote: Callable[[str], str], clients: Callable[[str], TestClient]) -> None:
    """Catches text of `curl -d` that is read as Latin-1, and answered all the same."""
    client = clients("sequence")
    text = "word1 花呗 wörd2"
    expected = client.post("/v1/model_prediction/", json={"sentence1": text, "sentence2": ""}).json()
    body = f"sentence1={quote(text)}&sentence2="
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    found = client.post("/v1/model_prediction/", content=body.encode(), headers=headers).json()
    assert found == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("path", "head", "examples"),
    [
        *((path, "masked" if path == "/v1/fill-mask" else "sequence", 12) for path in PATHS),
        *soak(*itertools.product(PATHS, ("sequence", "masked"), (40,))),
    ],
)
def test_every_request_gets_a_documented_answer(
    path: str, head: str, examples: int, clients: Callable[[str], TestClient]
) -> None:
    """Catches a 500, an answer that the schema does not describe, and a mistake that is accepted.

    Requests that follow the schema may be rejected: which fields a record has depends on the model.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[test]'")
    client = clients(head)
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    ((method, operation),) = schema[path].items()
    modes = [mode for mode in schemathesis.GenerationMode if method == "post" or mode.is_positive]
    media = ["application/json", "application/x-www-form-urlencoded"] if path.endswith("model_prediction/") else [None]
    requests = [operation.as_strategy(mode, media_type=kind) for mode in modes for kind in media]
    excluded = schemathesis.checks.CHECKS.get_by_names(["positive_data_acceptance"])

    @settings(max_examples=examples, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(requests))
    def check(case: Any) -> None:
        try:
            request = client.build_request(**case.as_transport_kwargs(base_url="http://testserver"))
            request.read()  # a multipart form is streamed, and schemathesis looks at it
        except (AttributeError, TypeError):  # a multipart form with a number for a file, which httpx cannot send
            reject()
        answer = client.send(request)
        case.validate_response(answer, excluded_checks=excluded)

    check()
    assert client.get("/healthz").status_code == 200
