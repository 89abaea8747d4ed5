"""What a server rejects: one message each, and it still answers afterwards."""

import asyncio
import itertools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import HTTPException, Request, Response
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from serving_clients import Connect
from starlette.testclient import TestClient

from experiment.errors import UserError
from experiment.local_server import allowed_hosts
from finetune.inference import Inference
from finetune.kinds import cloze, embedding
from finetune.prediction.predictor import Predictor
from finetune.prediction.saved_task import SavedTask, write_saved_task
from finetune.serve.app import make_app
from finetune.serve.middleware import limit_size
from finetune.serve.monitoring import JsonFormatter, log_as_json
from finetune.serve.schemas import FillMaskRequest, PredictRequest

JSON = {"Content-Type": "application/json"}
DEEP = b'{"records": [{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}]}"


@pytest.fixture
def client(folders: dict[str, Path], connect: Connect) -> TestClient:
    return connect(folders["sequence"])


@pytest.fixture
def shared_client(clients: Callable[[str], TestClient]) -> TestClient:
    return clients("sequence")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "the request: field required"),
        (b"{", 400, "invalid JSON"),
        (b'{"texts": ["\xff"]}', 400, "the request is not JSON in UTF-8"),
        (b"[]", 422, "the request: input should be an object"),
        (b"null", 422, "the request: "),
        (b"{}", 422, "expected one of texts, pairs and records, found none"),
        (b'{"texts": ["a"], "pairs": [["a", "b"]]}', 422, "found texts and pairs"),
        (b'{"texts": "a"}', 422, "texts: input should be a valid list"),
        (b'{"texts": ["a", 3]}', 422, r"texts\[1\]: input should be a valid string"),
        (b'{"texts": [null]}', 422, r"texts\[0\]"),
        (b'{"texts": null}', 422, "texts"),
        (b'{"texts": ["\\ud800"]}', 422, r"texts\[0\]: expected Unicode text"),
        (b'{"texts": ["a"], "top": 1}', 422, "top: unknown field; /docs lists"),
        (b'{"texts": ["a"], "calibrated": "yes"}', 422, "calibrated: input should be a valid boolean"),
        (b'{"texts": ["a"], "calibrated": true}', 422, "^calibrated: the model has no temperature"),
        (b'{"pairs": [["a"]]}', 422, r"pairs\[0\]: list should have at least 2 items"),
        (b'{"records": [{"text": 1}]}', 422, r"records\[0\]: expected text in 'text', found 1"),
        (b'{"records": [{"text": "\\ud800"}]}', 422, r"records\[0\]: expected Unicode text in 'text'"),
        (b'{"records": [{"words": "a"}]}', 422, r"records\[0\]: expected text; found words"),
        (b'{"records": [{"\\ud800": "a"}]}', 422, r"records\[0\]: expected text; found \\ud800"),
        (b'{"a\\nb": 1, "texts": []}', 422, "a b: unknown field"),
        (json.dumps({"k" * 50_000: 1, "texts": []}).encode(), 422, "^k{500} …$"),
        (DEEP, (400, 422), ""),
        (
            json.dumps({"texts": ["a"] * 10_000}, separators=(",", ":")).encode(),
            413,
            "10,000 texts in one request; at most 64",
        ),
        (json.dumps({"texts": ["a" * 100_000]}).encode(), 413, "the request is larger than 64 KiB"),
    ],
)
def test_a_mistake_is_one_message(shared_client: TestClient, body: bytes, status: Any, message: str) -> None:
    """Catches a traceback, a 500, or a server that is unusable afterwards."""
    answer = shared_client.post("/v1/predict", content=body, headers=JSON)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert list(answer.json()) == ["error"]
    assert len(answer.json()["error"].splitlines()) == 1
    assert re.search(message, answer.json()["error"]), answer.text
    assert shared_client.post("/v1/predict", json={"texts": ["word1"]}).status_code == 200


@pytest.mark.parametrize(
    ("request_type", "values"),
    [
        (PredictRequest, {"texts": [1] * 9}),
        (PredictRequest, {"pairs": [1] * 9}),
        (PredictRequest, {"pairs": [[1]] * 9}),
        (PredictRequest, {"records": [1] * 9}),
        (PredictRequest, {"texts": [], "a": 1, "b": 2}),
        (FillMaskRequest, {"texts": [], "options": [1] * 9}),
        (FillMaskRequest, {"texts": [], "options": [[1] * 9]}),
        (FillMaskRequest, {"texts": [], "options": [[[1] * 9] * 9]}),
    ],
)
def test_one_of_many_mistakes_is_reported(request_type: type[BaseModel], values: Any) -> None:
    """Catches a server that answers nobody for seconds, while pydantic reports each mistake in a request of 1 MiB."""
    with pytest.raises(ValidationError) as caught:
        request_type.model_validate(values)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "\u202e", "word1 " * 8000, "🙂" * 5000, "[SEP] [PAD] [CLS]", "a" * 60_000]
)
def test_strange_texts_are_answered(shared_client: TestClient, text: str) -> None:
    """Catches an exception of the tokenizer or the model, and a batch without tokens."""
    answer = shared_client.post("/v1/predict", json={"texts": [text]})
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["predictions"][0]["probabilities"]) == {"no", "yes"}


def test_no_texts_have_no_predictions(client: TestClient, folders: dict[str, Path], connect: Connect) -> None:
    """Catches an error for the empty request of a client."""
    assert client.post("/v1/predict", json={"texts": []}).json() == {"predictions": []}
    assert client.post("/v1/embed", json={"texts": []}).json() == {"embeddings": []}
    for body in ({"texts": []}, {"texts": [], "options": []}):
        assert connect(folders["masked"]).post("/v1/fill-mask", json=body).json() == {"predictions": []}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"texts": ["word1"]}, "texts[0]: no [MASK] to fill"),
        (
            {"texts": ["［MASK］"]},
            "texts[0]: no [MASK] to fill; it has 1 in full-width characters: write '[MASK]' in ASCII",
        ),
        (
            {"texts": ["【MASK】"]},
            "texts[0]: no [MASK] to fill; it has 1 in full-width characters: write '[MASK]' in ASCII",
        ),
        ({"texts": ["word1 " * 80 + "[MASK]"]}, "texts[0]: a [MASK] is beyond the first 64 tokens"),
        ({"texts": ["[MASK]"], "top_k": 0}, "top_k: input should be greater than or equal to 1"),
        ({"texts": ["[MASK]"], "options": []}, "options: expected a list for each of 1 texts, found 0"),
        ({"texts": ["[MASK]"], "options": [[]]}, "texts[0]: 1 [MASK], but 0 lists of options"),
        ({"texts": ["[MASK] [MASK]"], "options": [[["a", "b"], ["b", " "]]]}, "texts[0]: an option is empty"),
        ({"texts": ["[MASK]"], "options": [[["a"]]]}, "options[0][0]: list should have at least 2 items"),
    ],
)
def test_masks_that_cannot_be_filled(body: Any, message: str, clients: Callable[[str], TestClient]) -> None:
    """Catches an answer without the masks that were asked for, and a traceback."""
    answer = clients("masked").post("/v1/fill-mask", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/labels", 404), ("POST", "/v1/predict/", 404), ("DELETE", "/v1/model", 405)],
)
def test_what_the_server_does_not_have(shared_client: TestClient, method: str, path: str, status: int) -> None:
    """Catches an answer that does not say what to do."""
    answer = shared_client.request(method, path, follow_redirects=False)
    assert answer.status_code == status
    assert answer.json()["error"].endswith("; /docs lists those of this server")


@pytest.mark.parametrize("model_type", ["funnel", "perceiver", "t5"])
def test_models_without_hidden_states_of_tokens(
    model_type: str, classifier_of: Callable[[str], Path], connect: Connect
) -> None:
    """Catches a traceback at the start, for models that predict but cannot embed."""
    served = connect(classifier_of(model_type))
    assert served.post("/v1/predict", json={"texts": ["word1"]}).status_code == 200
    answer = served.post("/v1/embed", json={"texts": ["word1"]})
    assert answer.status_code == 404
    assert answer.json()["error"] == "the model embeds no texts: it has no hidden state for each token"


def test_what_the_model_cannot_do(folders: dict[str, Path], connect: Connect, tmp_path: Path) -> None:
    """Catches answers of a model that was not made for the question."""
    masked, tagger = connect(folders["masked"]), connect(folders["token"])
    for path, body in (("predict", {"texts": ["a"]}), ("model_prediction/", {"sentence1": "a"})):
        assert masked.post(f"/v1/{path}", json=body).status_code == 404
    embedder = Path(shutil.copytree(folders["sequence"], tmp_path / "embedder"))
    write_saved_task(embedder, SavedTask(embedding.Kind(embedding.Config(), ()), None))
    answer = connect(embedder).post("/v1/model_prediction/", json={"sentence1": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"] == "a model of kind embedding predicts no label; use /v1/predict"
    assert tagger.post("/v1/fill-mask", json={"texts": ["a [MASK]"]}).status_code == 404
    answer = tagger.post("/v1/predict", json={"texts": ["a"]})
    assert answer.status_code == 422
    assert "accepts records" in answer.json()["error"]


def test_the_token(folders: dict[str, Path], connect: Connect) -> None:
    """Catches a route that answers without the token, probes that need one, and a page of another site that has the
    token but gets no answer."""
    client = connect(folders["sequence"], token="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer é"}):
        for method, path in (("POST", "/v1/predict"), ("GET", "/v1/model"), ("GET", "/metrics"), ("GET", "/other")):
            encoded = {name: value.encode() for name, value in headers.items()}
            answer = client.request(method, path, json={"texts": ["a"]}, headers=encoded)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer TOKEN" in answer.json()["error"]
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    for headers in ({}, {"Origin": "https://other.example"}):
        sent = {"Authorization": "Bearer secret", **headers}
        assert client.post("/v1/predict", json={"texts": ["a"]}, headers=sent).status_code == 200


def test_rejected_requests_are_counted_by_path(folders: dict[str, Path], connect: Connect) -> None:
    """Catches clients without the token that no metric of a route shows, and paths of clients as labels of metrics."""
    client = connect(folders["sequence"], token="secret")
    for path in ("/v1/predict", "/v1/model_prediction", "/made-up"):
        assert client.post(path, json={"texts": ["a"]}).status_code == 401
    metrics = client.get("/metrics", headers={"Authorization": "Bearer secret"}).text
    for path in ("/v1/predict", "/v1/model_prediction", "unknown"):
        assert f'deepcloze_requests_total{{path="{path}",status="401"}} 1.0' in metrics
    assert "made-up" not in metrics


@pytest.mark.parametrize("library", ["httpx", "httpx2"])  # of huggingface_hub 1 and 2
def test_requests_to_the_hub_are_not_logged(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line in the log for each request of a reload to the Hub."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # pytest captures the log
    monkeypatch.setattr(logging, "captureWarnings", lambda _: None)
    logging.getLogger(library).setLevel(logging.NOTSET)
    log_as_json()
    assert logging.getLogger(library).level == logging.WARNING


def test_a_body_without_a_length_is_counted(client: TestClient) -> None:
    """Catches a limit on size that a chunked request avoids."""

    def chunks() -> Iterator[bytes]:
        yield b'{"texts": ["'
        for _ in range(100):
            yield b"a" * 1024
        yield b'"]}'

    answer = client.post("/v1/predict", content=chunks(), headers=JSON)
    assert answer.status_code == 413
    assert "larger than 64 KiB" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/model_prediction/"])
def test_a_client_that_goes_while_it_sends(path: str, client: TestClient) -> None:
    """Catches lost connections that logs and metrics count as mistakes of clients."""
    events = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        return next(events, {"type": "http.disconnect"})

    async def send(_: object) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    client.portal.call(client.app, scope, receive, send)
    assert f'deepcloze_requests_total{{path="{path}",status="499"}} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/predict", [(b"origin", b"http://a.example")], 403),
        ("POST", "/other", [], 404),
        ("PUT", "/v1/predict", [], 405),
        ("POST", "/v1/predict", [(b"content-length", b"1000000")], 413),
    ],
)
def test_a_rejected_request_is_answered_once_it_is_sent(
    method: str, path: str, headers: list[tuple[bytes, bytes]], status: int, client: TestClient
) -> None:
    """Catches a connection that is closed while the client still sends, and the answer lost with it."""
    arriving = [{"type": "http.request", "body": b"a", "more_body": more} for more in (False, True, True)]
    sent: list[Any] = []

    async def receive() -> Any:
        return arriving.pop() if arriving else await asyncio.Event().wait()

    async def send(event: Any) -> None:
        assert arriving == []
        sent.append(event)

    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
    client.portal.call(client.app, scope, receive, send)
    assert sent[0]["status"] == status


def test_a_body_that_is_never_read_is_not_awaited(client: TestClient) -> None:
    """Catches ten seconds of waiting for a body that is announced as a terabyte: `--timeout` may be shorter."""

    async def receive() -> Any:
        raise AssertionError

    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    app = limit_size(client.app, client.state.limits)  # type: ignore[attr-defined]
    scope = {"type": "http", "path": "/v1/predict", "headers": [(b"content-length", b"1" + b"0" * 12)]}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413


def test_bodies_of_all_requests_are_limited_together(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the number of connections, each of which sends as much as one request may have,
    and a refused client that is slow to send the rest of its body, for which others are refused too."""

    async def read(scope: Any, receive: Any, send: Any) -> None:
        try:
            await Request(scope, receive).body()
            status = 200
        except HTTPException as error:
            status = error.status_code
        await Response(status_code=status)(scope, receive, send)

    monkeypatch.setattr("finetune.serve.middleware._HELD_BYTES", 100 * 1024)
    app = limit_size(read, client.state.limits)  # type: ignore[attr-defined]

    async def post(waits: asyncio.Event, ends: asyncio.Event) -> int:
        """Send 60 KiB, then the end of the body once `ends` is set. Return the status."""
        end = {"type": "http.request", "body": b"", "more_body": False}
        parts = [end, {"type": "http.request", "body": b"a" * 60 * 1024, "more_body": True}]
        sent: list[Any] = []

        async def receive() -> Any:
            if len(parts) == 1:
                waits.set()
                await ends.wait()
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            sent.append(event)

        await app({"type": "http", "headers": []}, receive, send)
        return int(sent[0]["status"])

    async def post_three() -> list[int]:
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(post(*events[:2]))
        await events[0].wait()
        refused = asyncio.create_task(post(*events[2:]))
        await events[2].wait()  # the rest of the refused body is discarded, and has not been sent
        events[1].set()
        statuses = [await first, await post(asyncio.Event(), events[1])]
        events[3].set()
        return [*statuses, await refused, await post(asyncio.Event(), events[1])]

    assert asyncio.run(post_three()) == [200, 200, 503, 200]


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("multipart/form-data", b"--x", "Missing boundary in multipart."),
        (
            "application/x-www-form-urlencoded",
            b"&".join(b"a%d=1" % number for number in range(100)),
            "the form has more than 10 fields",
        ),
        ("application/x-www-form-urlencoded", b"sentence1=\xbb\xa8\xdf\xc2", "the form is not UTF-8"),
        ("application/x-www-form-urlencoded", b"sentence1=%bb%a8", "the form is not UTF-8"),
        ("application/json", b"[" * 20_000, "the request is not JSON in UTF-8, or is nested too deeply"),
        ("application/json", b'{"sentence1": ' + b"9" * 5000 + b"}", "the request is not JSON in UTF-8"),
    ],
)
def test_an_unreadable_form_or_body(shared_client: TestClient, kind: str, body: bytes, message: str) -> None:
    """Catches a form that is said to be no JSON, and a 500 for what no parser accepts."""
    answer = shared_client.post("/v1/model_prediction/", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].startswith(message)


def test_another_content_type(client: TestClient) -> None:
    """Catches a puzzling message for what is not JSON."""
    answer = client.post("/v1/predict", content="texts\na\n", headers={"Content-Type": "text/csv"})
    assert answer.status_code == 415
    assert "expected `Content-Type: application/json`" in answer.json()["error"]


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
@pytest.mark.parametrize(
    ("path", "body"), [("predict", '{"texts": ["a"]}'), ("model_prediction/", ' {"sentence1": "a"}')]
)
def test_json_without_its_type(shared_client: TestClient, headers: dict[str, str], path: str, body: str) -> None:
    """Catches `curl -d '{…}'` that is rejected: curl calls it a form."""
    answer = shared_client.post(f"/v1/{path}", content=body, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("names", "headers", "status"),
    [
        ((), {"Host": "localhost:8000"}, 200),
        ((), {"Host": "127.0.0.1"}, 200),
        ((), {"Host": "[::1]:8000"}, 200),
        ((), {"Host": "evil.example:8000"}, 421),
        ((), {"Host": ""}, 421),
        ((), {"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ((), {"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
        ((), {"Host": "localhost:8000", "Origin": "https://evil.example"}, 403),
        ((), {"Host": "localhost:8000", "Origin": "null"}, 403),
        (("Models.example",), {"Host": "models.example"}, 200),
        (("models.example",), {"Host": "evil.example"}, 421),
        (("models.example",), {"Host": "127.0.0.1:8000", "Origin": "https://models.example"}, 200),
        (("models.example",), {"Host": "127.0.0.1:8000", "Origin": "https://evil.example"}, 403),
        (("fe80::1",), {"Host": "[fe80::1]:8000"}, 200),
    ],
)
def test_other_hosts_and_pages_of_other_sites(
    shared_client: TestClient, names: tuple[str, ...], headers: dict[str, str], status: int
) -> None:
    """Catches a page on the web that reads predictions, through a name that it has pointed at this machine, one that
    lets visitors compute, and requests that are rejected behind a proxy, which calls the server by its address."""
    hosts = allowed_hosts(names, "127.0.0.1")
    app = make_app(shared_client.state, None, hosts)  # type: ignore[attr-defined]
    answer = TestClient(app).get("/v1/model", headers=headers)
    assert answer.status_code == status, answer.text
    if status == 421:
        assert f"does not answer to the host '{headers['Host']}'; `deepcloze serve" in answer.json()["error"]


@pytest.mark.parametrize("name", ["models.example:443", "a.example,b.example", "https://models.example", "[::1]:8000"])
def test_names_of_hosts_that_no_request_has(name: str) -> None:
    """Catches a server that answers no request, because a port, a list or a URL was given as its name."""
    with pytest.raises(UserError, match=r"^--allowed_hosts: expected one name without port, such as models\.example"):
        allowed_hosts([name], "127.0.0.1")


def test_probes_have_any_name(client: TestClient) -> None:
    """Catches a server that is restarted because Kubernetes asks for its health by address, or a balancer by HEAD."""
    app = make_app(client.state, None, allowed_hosts(["models.example"], "0.0.0.0"))  # type: ignore[attr-defined]
    for method, path in itertools.product(("GET", "HEAD"), ("/healthz", "/readyz")):
        assert TestClient(app).request(method, path, headers={"Host": "10.0.0.7:8000"}).status_code == 200
    assert TestClient(app).get("/metrics", headers={"Host": "10.0.0.7:8000"}).status_code == 421


def test_requests_need_no_thread(shared_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread that each request waits for, probes included."""

    async def run_in_threadpool(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("fastapi.dependencies.utils.run_in_threadpool", run_in_threadpool)
    assert [shared_client.get(path).status_code for path in ("/healthz", "/v1/model", "/metrics")] == [200] * 3


def test_addresses_that_others_can_reach_have_any_name() -> None:
    """Catches a server on a network that answers to localhost only."""
    assert allowed_hosts((), "0.0.0.0") is None
    assert allowed_hosts((), "::1") == {"localhost", "127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"texts": ["[MASK]"], "options": [[["word1"] * 65]]}, "65 options in one request; at most 64"),
        ({"texts": ["[MASK]"] * 7, "top_k": 1000}, "7,000 candidates for all masks; at most 6,400"),
        (
            {"texts": ["word1 " * 50 + "[MASK]"], "options": [[["word1 word2 word3 " * 3, "word4 word5 " * 4] * 32]]},
            "a text, with its options, has .* tokens; at most 500",
        ),
        (
            {"texts": ["[MASK]"] * 2, "options": [[["word1 " * 32, "word2 " * 32]], [["word1 " * 40, "word2 " * 40]]]},
            "ranking the options takes 3,720 tokens, .*; at most 3,000",
        ),
    ],
)
def test_too_much_for_masks(body: Any, message: str, folders: dict[str, Path], connect: Connect) -> None:
    """Catches a request of few texts that takes gigabytes, and minutes of a core."""
    client = connect(folders["masked"], max_item_tokens=500, max_option_tokens=3000)
    answer = client.post("/v1/fill-mask", json=body)
    assert answer.status_code == 413, answer.text
    assert re.search(message, answer.json()["error"])
    assert client.post("/v1/fill-mask", json={"texts": ["[MASK]"], "top_k": 1000}).status_code == 200


CHOICES = {"question": "word1", "choices": ["word2"] * 33}
BLANK = {"article": "word1 _", "options": [["word1 " * 40, "word2 " * 40]]}


@pytest.mark.parametrize(
    ("head", "records", "message"),
    [
        ("choice", [CHOICES, CHOICES], "66 options in one request; at most 64"),
        ("masked", [BLANK | {"options": [["word2"] * 65]}], "65 options in one request; at most 64"),
        ("masked", [BLANK], "ranking the options takes 1,860 tokens, .*; at most 1,000"),
    ],
)
def test_too_many_choices(
    head: str,
    records: Any,
    message: str,
    folders: dict[str, Path],
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a request of a few records that is refused only after it took gigabytes, and a queue that does not count
    their choices."""
    folder = folders[head]
    if head == "masked":
        folder = Path(shutil.copytree(folder, tmp_path / "cloze"))
        write_saved_task(folder, SavedTask(cloze.Kind(cloze.Config(scoring="zero_shot"), ()), None))
    client = connect(folder, max_option_tokens=1000)
    encode, encoded = Predictor.encode, []
    monkeypatch.setattr(Predictor, "encode", lambda self, records: encoded.append(records) or encode(self, records))
    answer = client.post("/v1/predict", json={"records": records})
    assert (answer.status_code, encoded) == (413, []), answer.text
    assert re.search(message, answer.json()["error"])
    few = {"choices": ["word2", "word3"]} if head == "choice" else {"options": [["word2", "word3"]]}
    assert client.post("/v1/predict", json={"records": [records[0] | few]}).status_code == 200
    client.state.admission.texts += 255  # type: ignore[attr-defined]
    assert client.post("/v1/predict", json={"records": [records[0] | few]}).status_code == 503


def test_a_full_queue(client: TestClient) -> None:
    """Catches a queue without limits, and one that does not become empty again."""
    admission = client.state.admission  # type: ignore[attr-defined]
    admission.texts += 250
    assert client.post("/v1/predict", json={"texts": ["a"] * 6}).status_code == 200
    answer = client.post("/v1/predict", json={"texts": ["a"] * 7})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.get("/readyz").status_code == 200
    admission.texts += 6
    assert client.get("/readyz").status_code == 503
    admission.texts -= 256
    assert admission.texts == 0


def test_a_request_that_takes_too_long(
    folders: dict[str, Path], connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a client that waits forever, and one text too many in the queue after each timeout."""
    client, resume = connect(folders["sequence"], timeout=0.2), threading.Event()
    compute = Inference.compute_batch
    monkeypatch.setattr(Inference, "compute_batch", lambda self, examples: resume.wait(60) and compute(self, examples))
    answer = client.post("/v1/predict", json={"texts": ["a"]})
    resume.set()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "not answered within 0.2 s" in answer.json()["error"]
    assert client.state.admission.texts == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["predict", "embed", "fill-mask"])
def test_running_out_of_memory_is_the_servers_error(
    path: str, folders: dict[str, Path], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a lack of memory that is put down to the client, or not logged, a request that is never answered
    although memory suffices for each of its texts, a warning for each batch, and batches that stay small once there is
    memory again."""
    client = connect(folders["masked" if path == "fill-mask" else "sequence"])
    limit, computed = 0, []

    def compute(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        computed.append(len(inputs[0]))
        if computed[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    client.state.served.loaded.model.base_model.encoder.register_forward_pre_hook(compute)  # type: ignore[attr-defined]
    body = {"texts": ["word1 [MASK]"] * 8}
    answer = client.post(f"/v1/{path}", json=body)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == "out of memory; try again, or send fewer or shorter texts"
    assert "out of memory" in caplog.messages
    limit = 1
    for _ in range(2):
        computed = []
        assert client.post(f"/v1/{path}", json=body).status_code == 200
        assert computed == [8, *[4, *[2, 1, 1] * 2] * 2]
    assert [message for message in caplog.messages if "out of memory" in message] == [
        "out of memory: computing fewer than 8 texts at once",
        "out of memory",
    ]
    computed, limit = [], 8
    assert client.post(f"/v1/{path}", json=body).status_code == 200
    assert computed == [8]


@pytest.mark.parametrize("path", ["predict", "embed", "fill-mask"])
def test_outputs_that_are_not_finite(
    path: str, folders: dict[str, Path], connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches NaN for a text, which JSON does not have and which made a 500 of a bug, or a prediction without a sign;
    other texts that fail with it; and clients that are told where the model is."""
    folder = shutil.copytree(folders["masked" if path == "fill-mask" else "sequence"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.position_embeddings.weight"][30] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    client = connect(folder)
    for text, status in (("[MASK] word1", 200), ("[MASK] " + "word1 " * 30, 500), ("[MASK] word1", 200)):
        answer = client.post(f"/v1/{path}", json={"texts": [text]})
        assert answer.status_code == status, answer.text
        message = f"{folder}: the model's outputs are not finite in fp32; its weights are damaged, or its training has"
        assert ("the model's outputs are not finite" in answer.text) == (message in caplog.text) == (status == 500)
        assert str(folder) not in answer.text
        caplog.clear()


@pytest.mark.parametrize(("computes", "status"), [(False, 503), (True, 200)])
def test_a_device_that_fails_is_not_healthy(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, computes: bool, status: int
) -> None:
    """Catches a server that nothing restarts, though it answers all requests with 500 after an error of its GPU. And
    one that is restarted although only one request has failed."""

    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    assert client.get("/healthz").status_code == 200
    monkeypatch.setattr(Inference, "compute_batch", fail)
    if not computes:
        monkeypatch.setattr(torch, "ones", fail)
    assert client.post("/v1/predict", json={"texts": ["a"]}).status_code == 500
    for method in ("GET", "HEAD"):
        assert client.request(method, "/healthz").status_code == status


def test_a_bug_is_a_500_without_texts_in_the_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches texts of clients in logs, through exceptions that quote them, and a server that ends with a bug."""
    caplog.set_level(logging.INFO)

    secret = "my secret diary"

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot compute {secret}")

    with monkeypatch.context() as patch:
        patch.setattr(Inference, "compute_batch", fail)
        answer = client.post("/v1/predict", params={"q": secret}, json={"texts": [secret]})
    assert answer.status_code == 500
    assert answer.json() == {"error": "an error in the server; its log says more"}
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "finetune.serve"]
    assert all("diary" not in line for line in lines)
    assert any(json.loads(line).get("exception") == "RuntimeError" for line in lines)
    (request,) = (json.loads(line) for line in lines if '"request"' in line)
    assert (request["path"], request["status"], request["texts"]) == ("/v1/predict", 500, 1)
    assert client.post("/v1/predict", json={"texts": ["a"]}).status_code == 200


def test_pages_need_no_network(client: TestClient) -> None:
    """Catches a page that loads a script or a font from elsewhere, and paths of clients as labels of metrics."""
    for path in ("/", "/docs"):
        page = client.get(path)
        assert client.head(path).status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "http://" not in page.text
        assert "https://" not in page.text
        assert "src=" not in page.text
        policy = page.headers["content-security-policy"]
        assert policy == "default-src 'unsafe-inline' 'self'; img-src data:; frame-ancestors 'none'"
    client.get("/made-up-path")
    assert "made-up-path" not in client.get("/metrics").text
