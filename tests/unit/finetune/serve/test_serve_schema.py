"""Requests that schemathesis makes from the OpenAPI schema."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_clients import Connect

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[test]'")

PATHS = ("/v1/predict", "/v1/fill-mask", "/v1/embed", "/v1/model_prediction/", "/v1/model", "/healthz", "/readyz")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("head", ["sequence", "masked"])
@pytest.mark.parametrize("path", PATHS)
def test_every_request_gets_a_documented_answer(
    path: str, head: str, folders: dict[str, Path], connect: Connect
) -> None:
    """Catches a 500, an answer that the schema does not describe, and a mistake that is accepted.

    Requests that follow the schema may be rejected: which fields a record has depends on the model.
    """
    client = connect(folders[head])
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    ((method, operation),) = schema[path].items()
    modes = [mode for mode in schemathesis.GenerationMode if method == "post" or mode.is_positive]
    media = ["application/json", "application/x-www-form-urlencoded"] if path.endswith("model_prediction/") else [None]
    requests = [operation.as_strategy(mode, media_type=kind) for mode in modes for kind in media]
    excluded = schemathesis.checks.CHECKS.get_by_names(["positive_data_acceptance"])

    @settings(max_examples=40, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(requests))
    def check(case: Any) -> None:
        answer = client.request(**case.as_transport_kwargs(base_url="http://testserver"))
        answer.request.read()  # a multipart form is streamed, and schemathesis looks at it
        case.validate_response(answer, excluded_checks=excluded)

    check()
    assert client.get("/healthz").status_code == 200
