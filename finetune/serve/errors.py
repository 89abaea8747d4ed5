"""Every error of a client is answered with {"error": MESSAGE}."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from experiment.errors import UserError
from finetune.serve.limits import error_response

NOT_JSON = "the request is not JSON in UTF-8"
_FASTAPI_NOT_JSON = "There was an error parsing the body"


def handle_errors(app: FastAPI) -> None:
    """Answer the errors that routes raise."""

    @app.exception_handler(UserError)
    async def answer_user_error(_: Request, error: UserError) -> Response:
        return error_response(422, str(error))

    @app.exception_handler(HTTPException)
    async def answer_http_error(_: Request, error: HTTPException) -> Response:
        # FastAPI's own message does not say what is wrong with a body that cannot be decoded or is nested too deeply.
        message = NOT_JSON if error.detail == _FASTAPI_NOT_JSON else str(error.detail)
        return error_response(error.status_code, message, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def answer_bug(_: Request, __: Exception) -> Response:
        return error_response(500, "an error in the server; its log says more")

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, invalid: RequestValidationError) -> Response:
        errors = invalid.errors()
        if errors[0]["type"] == "json_invalid":
            return error_response(400, f"invalid JSON: {errors[0]['ctx']['error']}")
        content = request.headers.get("content-type", "")
        if errors[0]["loc"] == ("body",) and "json" not in content:
            return error_response(415, f"expected `Content-Type: application/json`, found '{content}'")
        return error_response(422, describe_errors(errors))


def describe_errors(errors: Sequence[Any]) -> str:
    """The first error that pydantic reports, as one line such as `texts[2]: input should be a valid string`."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in errors[0]["loc"][1:])
    message = errors[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{place.removeprefix('.') or 'the request'}: {message[0].lower()}{message[1:]}{more}"
