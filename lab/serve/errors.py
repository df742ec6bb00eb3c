"""Errors in OpenAI's form, whatever raised them; no prompt is quoted but to who sent it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_exceeded"}  # else by the hundred


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody


def documented(**statuses: str) -> dict[int | str, dict[str, Any]]:
    """For a route's description: which errors it answers, and when (`_429="..."`)."""
    return {status.strip("_"): {"model": Error, "description": text} for status, text in statuses.items()}


class ApiError(Exception):
    """Becomes `{"error": {...}}`, before an answer or in the middle of a stream."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": clean(message), "type": kind, "param": param, "code": code}}
        self.headers = {"retry-after": str(retry_after_s)} if retry_after_s is not None else {}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def wrong(param: str, value: Any, rule: str) -> ApiError:
    """400: the value, the rule, the remedy."""
    said = f"{param}={str(value)[:60]!r}" if isinstance(value, str) else f"{param}={str(value)[:60]}"
    return ApiError(400, f"{said}: {rule}", "invalid_request_error", param=param)


def handle_errors(app: FastAPI) -> None:
    described = app.openapi

    def without_422() -> dict[str, Any]:
        """FastAPI describes errors of its own, which are never answered: what is invalid is a 400 here."""
        description = described()
        for path in description["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return description

    app.openapi = without_422  # type: ignore[method-assign]

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message, param = f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][1]}", None
        else:
            message = "; or ".join(dict.fromkeys(_said(one) for one in _of_one_value(error.errors())))
            param = str(first["loc"][1]) if first["loc"][1:] else None
        return ApiError(400, message, "invalid_request_error", param=clean(param) if param else None).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = KINDS.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
        response = ApiError(error.status_code, str(error.detail), kind).response()
        response.headers.update(error.headers or {})
        return response


def _of_one_value(errors: Seq[Any]) -> list[Any]:
    """The first, and where its value may be of several kinds, the first of each: `loc` names them, as in list[Part]."""
    loc = errors[0]["loc"]
    kind = next((i for i, part in enumerate(loc) if _is_kind(part)), len(loc))
    found: dict[Any, Any] = {}
    for one in errors:
        if one["loc"][:kind] == loc[:kind]:
            found.setdefault(one["loc"][kind : kind + 1], one)
    return list(found.values())


def _said(error: Any) -> str:
    *path, last = error["loc"][1:] or ["body"]
    unknown = error["type"] == "extra_forbidden"
    names = [str(part) for part in path if not _is_kind(part)] + ([str(last)] if unknown or not _is_kind(last) else [])
    return f"{'.'.join(names)}: {'this server knows no such parameter: leave it out' if unknown else error['msg']}"


def _is_kind(part: int | str) -> bool:
    return isinstance(part, str) and "[" in part


def clean(text: str) -> str:
    """Text that can be written as UTF-8, whatever a client put into its names."""
    return text[:1000].encode(errors="replace").decode()
