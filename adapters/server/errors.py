"""Errors in OpenAI's JSON form."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rc_agents import RCError

LOG = logging.getLogger("rc_agents.server")
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: Error


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in {
        400: "The request cannot be answered",
        401: "The key is missing or wrong",
        404: "No such model or path",
        413: "The body is too large",
        429: "The queue is full; Retry-After says when to try again",
        500: "The server failed",
        503: "The server is stopping",
        504: "The deadline passed before the answer was begun",
    }.items()
}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: for the client.
        param: of the request's body that is wrong.
        code: a word for programs.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = (
            {} if retry_after is None else {"Retry-After": str(retry_after)}
        )

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's form."""
        kind = KINDS.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def log(error: BaseException) -> None:
    """Logs where an error came from, without its words, which may quote a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    LOG.error("a request failed with %s\n%s", type(error).__name__, where)


def refusal(error: BaseException) -> Refused:
    """Returns what a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RCError):
        return Refused(400, str(error))
    return Refused(500, f"the server failed: {type(error).__name__}")


def respond(error: Refused) -> JSONResponse:
    """Returns the response of a refusal."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Makes an app answer every error in OpenAI's form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RCError)
    async def wrong(request: Request, error: RCError) -> JSONResponse:
        return respond(refusal(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(one) for one in first["loc"] if one != "body"]
        where = ".".join(place)
        said = first["msg"] if not where else f"{where}: {first['msg']}"
        return respond(Refused(400, said, param=where or None))

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> JSONResponse:
        refused = Refused(error.status_code, f"{error.detail}: {request.url.path}")
        refused.headers |= error.headers or {}
        return respond(refused)
