"""Exceptions as answers in OpenAI's format: a status and a sentence."""

from __future__ import annotations

import logging
import re
from json import JSONDecodeError
from typing import Any

from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from pyfasa.errors import FasaError

OVERSIZE = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")


class ClientGoneError(Exception):
    """The client closed its connection; nobody waits for the answer."""


class ModelUnusableError(FasaError, RuntimeError):
    """A model of the config file cannot be loaded."""


def payload(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error: ``{"error": {"message", "type", "param", "code"}}``."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def explain(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body for what a request raised; what nobody expects is logged with its traceback."""
    while getattr(error, "exceptions", None):  # task groups wrap what was raised in them
        error = error.exceptions[0]  # type: ignore[attr-defined]
    if isinstance(error, ClientGoneError):
        return 499, payload(499, "The client closed the request.")
    if isinstance(error, HTTPException):
        return error.status_code, payload(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return 400, payload(400, _invalid(error))
    if isinstance(error, JSONDecodeError):
        return 400, payload(400, f"The body is not JSON: {error.msg} at character {error.pos}.")
    if isinstance(error, FasaError):
        return 500, payload(500, str(error))
    if isinstance(error, ValueError):
        if found := OVERSIZE.search(str(error)):
            message = (
                f"The prompt has {found[1]} tokens and the context {found[2]}; shorten the prompt, "
                "or start the server with a larger n_ctx."
            )
            return 400, payload(400, message, "context_length_exceeded")
        if "logits_all" in str(error):
            return 400, payload(
                400, "logprobs need a server that was started with --logits_all true."
            )
    if "embedding=True" in str(error):
        return 400, payload(400, "Embeddings need a server that was started with --embedding true.")
    if isinstance(error, (ValueError, TemplateError)):
        return 400, payload(400, str(error) or type(error).__name__)
    logging.getLogger("uvicorn.error").error("a request failed", exc_info=error)
    return 500, payload(500, f"{type(error).__name__}: {error}")


async def respond(_: Request, error: Exception) -> JSONResponse:
    """`explain` as an exception handler of an application."""
    status, body = explain(error)
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse(body, status, headers=headers)


def _invalid(error: RequestValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return f"The body is not JSON: {reason} at character {first['loc'][-1]}."
    name = ".".join(str(part) for part in first["loc"][1:]) or "The body"
    if first["type"] == "missing":
        return f"{name} is missing."
    return f"{name} is {first.get('input')!r:.200}; {first['msg'][:1].lower()}{first['msg'][1:]}."
