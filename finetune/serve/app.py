"""The routes: each takes a typed request, and answers with JSON.

From outside to inside, a request passes `observe` (logs, metrics), `limit_time`, `limit_size`, `require_permission`,
`read_as_json`, and the FastAPI application. Every error of a client is answered with {"error": MESSAGE}.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from experiment.errors import UserError
from finetune.data.records import Record
from finetune.prediction.loaded_model import NotFiniteError
from finetune.prediction.predictor import Predictor
from finetune.serve import schemas
from finetune.serve.admission import busy
from finetune.serve.middleware import (
    FORM,
    error_response,
    limit_size,
    limit_time,
    observe,
    read_as_json,
    require_permission,
)
from finetune.serve.monitoring import log
from finetune.serve.served_model import ServedModel
from finetune.serve.serving_state import ServingState

_ABOUT = """Predictions of one model. Texts of all requests are computed together; an answer does not depend on others.
Errors are answered with `{"error": MESSAGE}`. If the server has a token, send `Authorization: Bearer TOKEN`."""

_DESCRIPTIONS = {
    400: "Invalid JSON, or not UTF-8",
    401: "The token is missing or wrong",
    403: "The request is from a page of another site",
    404: "The model cannot do this",
    408: "The request did not arrive in time",
    413: "The request is too large, or has too many texts",
    415: "The request is not JSON",
    421: "The server does not answer to this name",
    422: "The request is not as described here",
    500: "The model's outputs are not finite, or another error in the server; its log says more",
    503: "Too many texts are waiting, or memory runs out; try again after Retry-After",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": text} for status, text in _DESCRIPTIONS.items()
}
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'unsafe-inline' 'self'; img-src data:; frame-ancestors 'none'"}
_FORMS = (FORM, "multipart/form-data")
_FIELDS = 10  # of a form
_JSON_PATHS = ("/v1/predict", "/v1/fill-mask", "/v1/embed")

api = APIRouter(prefix="/v1", responses=_ERRORS)
site = APIRouter()

NOT_JSON = "the request is not JSON in UTF-8, or is nested too deeply"
_CLEARER = {
    "There was an error parsing the body": NOT_JSON,
    "Not Found": "no such path; /docs lists those of this server",
    "Method Not Allowed": "the path has no such method; /docs lists those of this server",
}
"""FastAPI's own messages -> ours."""


def make_app(state: ServingState, token: str | None, hosts: frozenset[str] | None = None) -> ASGIApp:
    """Return the whole application. hosts: that it answers to; None: any."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with state:
            yield

    settings: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="deepcloze serve", description=_ABOUT, lifespan=lifespan, **settings)
    app.state.serving_state = state
    app.include_router(api)
    app.include_router(site)
    handle_errors(app)
    permitted = require_permission(read_as_json(app, _JSON_PATHS), hosts, token)
    limited = limit_time(limit_size(permitted, state.limits), state.limits)
    paths = {getattr(route, "path", "unknown") for route in (*app.routes, *api.routes, *site.routes)}
    observed = observe(limited, state.metrics, paths)

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        # The start and the end of the server are no requests.
        await (observed if scope["type"] == "http" else app)(scope, receive, send)

    return route


async def _state(request: Request) -> ServingState:  # FastAPI calls other functions in a thread
    state: ServingState = request.app.state.serving_state
    return state


State = Annotated[ServingState, Depends(_state)]


@api.post("/predict", response_model=schemas.PredictResponse)
async def predict(asked: schemas.PredictRequest, state: State, request: Request) -> Response:
    """Predict for texts, pairs of texts, or records."""
    texts = request.state.texts = len(asked.texts or asked.pairs or asked.records)
    state.admission.check(texts)
    predictor = _predicting(state.served)
    records = _requested_records(asked, predictor, state.served.info)
    options = sum(predictor.kind.count_options(record) for record in records)
    with state.answering(texts, options) as worker:
        return await _render("predictions", await worker.predict(predictor, records, asked.calibrated))


@api.post("/fill-mask", response_model=schemas.FillMaskResponse)
async def fill_mask(asked: schemas.FillMaskRequest, state: State, request: Request) -> Response:
    """Fill the masks in texts with the most probable tokens, or rank given options."""
    request.state.texts = len(asked.texts)
    options = sum(len(each) for lists in asked.options or [] for each in lists)
    with state.answering(len(asked.texts), options) as worker:
        if worker.served.filler is None:
            raise HTTPException(404, f"the model fills no masks: its kind is {worker.served.info.kind}")
        if asked.options is None:
            masks = sum(text.count(worker.served.filler.mask) for text in asked.texts)
            state.admission.check_candidates(masks * asked.top_k)
            found = await worker.fill(asked.texts, asked.top_k)
        else:
            found = await worker.rank(asked.texts, asked.options)
        return await _render("predictions", found)


@api.post("/embed", response_model=schemas.EmbedResponse)
async def embed(asked: schemas.EmbedRequest, state: State, request: Request) -> Response:
    """Embed texts: the hidden states of the encoder's last layer, pooled."""
    request.state.texts = len(asked.texts)
    with state.answering(len(asked.texts)) as worker:
        if not worker.served.embedders:
            raise HTTPException(404, "the model embeds no texts: it has no hidden state for each token")
        return await _render("embeddings", await worker.embed(asked.texts, asked.pooling))


_SENTENCES = schemas.ModelPredictionRequest.model_json_schema()


@api.post("/model_prediction", include_in_schema=False)
@api.post(
    "/model_prediction/",
    response_model=schemas.LabelAndScore,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _SENTENCES} for kind in ("application/json", *_FORMS)},
        }
    },
)
async def model_prediction(state: State, request: Request) -> Response:
    """Predict for one text or pair, as JSON or as a form: `[label, probability of the label]`."""
    try:
        asked = schemas.ModelPredictionRequest.model_validate(await _read_json_or_form(request))
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None
    request.state.texts = 1
    with state.answering(1) as worker:
        texts = [asked.sentence1, *([asked.sentence2] if asked.sentence2 else [])]
        (found,) = await worker.predict(_predicting(worker.served), _text_records([texts], worker.served.info))
        if "label" not in found:
            raise HTTPException(404, f"a model of kind {worker.served.info.kind} predicts no label; use /v1/predict")
        return JSONResponse([found["label"], found["probabilities"][found["label"]]])


@api.get("/model", response_model=schemas.ModelInfo)
async def model(state: State) -> schemas.ModelInfo:
    """Return the model, and the requests that it accepts."""
    return state.served.info


@site.head("/healthz", include_in_schema=False)
@site.get("/healthz", response_model=schemas.Status, responses={503: {"model": schemas.Error}}, tags=["operation"])
async def healthz(state: State) -> Response:
    """Return whether the process answers, and its device has not failed."""
    if state.device_failed:
        raise HTTPException(503, "the device has failed; restart the server")
    return JSONResponse({"status": "ok"})


@site.head("/readyz", include_in_schema=False)
@site.get("/readyz", response_model=schemas.Status, responses={503: {"model": schemas.Error}}, tags=["operation"])
async def readyz(state: State) -> Response:
    """Return whether the server takes further requests."""
    if state.admission.is_full:
        raise busy("too many texts are waiting")
    return JSONResponse({"status": "ready"})


@site.get(
    "/metrics", tags=["operation"], responses={200: {"content": {"text/plain": {}}}, 401: {"model": schemas.Error}}
)
async def metrics(state: State) -> Response:
    """Return counts for Prometheus."""
    return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@site.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> HTMLResponse:
    """Return a page to try the model by hand."""
    return _html("page.html")


@site.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
async def docs() -> HTMLResponse:
    """Return the OpenAPI schema, readable; it needs no network."""
    return _html("docs.html")


def _html(name: str) -> HTMLResponse:
    return HTMLResponse(files(__package__).joinpath(name).read_text(encoding="utf-8"), headers=_PAGE_HEADERS)


async def _render(name: str, items: Sequence[Any]) -> Response:
    """Return {name: items} as JSON, which may take seconds: made in a thread, and one item after the other, since the
    event loop waits for each call of the encoder."""
    parts = await asyncio.to_thread(lambda: [JSONResponse(item).body for item in items])
    return Response(b'{"%b":[%b]}' % (name.encode(), b",".join(parts)), media_type="application/json")


async def _read_json_or_form(request: Request) -> Any:
    """Read JSON or a form. Raises HTTPException for anything else."""
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        body = await request.body()
        if content not in _FORMS or body.lstrip().startswith(b"{"):  # `curl -d` calls JSON a form
            return json.loads(body)
        if content == FORM:
            return _parse_form(body)
        return dict(await request.form(max_files=0, max_fields=_FIELDS))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, NOT_JSON) from error


def _parse_form(body: bytes) -> dict[str, str]:
    """Parse a form whose text may be UTF-8 as it is, as `curl -d` sends it: Starlette would read it as Latin-1. Raises
    HTTPException."""
    if body.count(b"&") >= _FIELDS:
        raise HTTPException(400, f"the form has more than {_FIELDS} fields")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict"))
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the form is not UTF-8") from error


def _requested_records(asked: schemas.PredictRequest, predictor: Predictor, info: schemas.ModelInfo) -> list[Record]:
    """Read the records. Raises UserError for input that the model rejects."""
    if asked.records:
        return [predictor.record(f"records[{index}]", values) for index, values in enumerate(asked.records)]
    rows = [[text] for text in asked.texts] or asked.pairs
    return _text_records(rows, info) if rows else []


def _predicting(served: ServedModel) -> Predictor:
    """Return the predictor. Raises HTTPException if the model does not predict."""
    if served.predictor is None:
        raise HTTPException(404, "a masked language model predicts no labels; use POST /v1/fill-mask")
    return served.predictor


def _text_records(rows: Sequence[Sequence[str]], info: schemas.ModelInfo) -> list[Record]:
    """Return the records of single texts or of pairs. Raises UserError for input that the model does not accept."""
    asked, name = ("texts", "text") if len(rows[0]) == 1 else ("pairs", "pair")
    if asked not in info.accepts:
        raise UserError(
            f"{asked}: the model, of kind {info.kind}, accepts {' and '.join(info.accepts)}; see GET /v1/model"
        )
    roles = ("text", "text_pair")
    return [Record(f"{name} {index}", dict(zip(roles, row, strict=False))) for index, row in enumerate(rows)]


def handle_errors(app: FastAPI) -> None:
    """Answer the errors that routes raise."""

    @app.exception_handler(UserError)
    async def answer_user_error(_: Request, error: UserError) -> Response:
        return error_response(422, str(error))

    @app.exception_handler(NotFiniteError)
    async def answer_not_finite(_: Request, error: NotFiniteError) -> Response:
        log.error("%s", error)
        return error_response(500, "the model's outputs are not finite; the server's log says more")

    @app.exception_handler(StarletteHTTPException)
    async def answer_http_error(_: Request, error: StarletteHTTPException) -> Response:
        message = _CLEARER.get(str(error.detail), str(error.detail))
        return error_response(error.status_code, message, dict(error.headers or {}))

    @app.exception_handler(MemoryError)
    async def answer_out_of_memory(request: Request, _: MemoryError) -> Response:
        return await answer_http_error(request, busy("out of memory; try again, or send fewer or shorter texts"))

    @app.exception_handler(Exception)
    async def answer_bug(_: Request, __: Exception) -> Response:
        return error_response(500, "an error in the server; its log says more")

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, invalid: RequestValidationError) -> Response:
        if (errors := invalid.errors())[0]["type"] == "json_invalid":
            return error_response(400, f"invalid JSON: {errors[0]['ctx']['error']}")
        content = request.headers.get("content-type", "")
        if errors[0]["loc"] == ("body",) and "json" not in content:
            return error_response(415, f"expected `Content-Type: application/json`, found '{content}'")
        return error_response(422, describe_errors(errors))


def describe_errors(errors: Sequence[Any]) -> str:
    """Return the first error that pydantic reports, as one line such as `texts[2]: input should be a valid string`."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in errors[0]["loc"][1:])
    message = errors[0]["msg"].removeprefix("Value error, ")
    if errors[0]["type"] == "extra_forbidden":
        message = "unknown field; /docs lists those of this request"
    if errors[0]["type"] == "model_attributes_type":
        message = "input should be an object"
    return f"{place.removeprefix('.') or 'the request'}: {message[0].lower()}{message[1:]}"
