"""Errors become responses here, and nowhere else. Every failure is answered with a problem document (RFC 9457).

A problem has `type`, `title`, `status`, `detail` and `instance`. With status 422 it also has `errors` (index, field and reason
of each of the first hundred; the index is null if the error is not in an operation) and `count` (of all errors). Internal
causes are logged, and never sent to the caller.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mdstore import exactjson
from mdstore.errors import (
    DeploymentBroken,
    InvalidOperations,
    InvalidRequest,
    MdstoreError,
    NotFound,
    PayloadTooLarge,
    RequestConflict,
    Unavailable,
)
from mdstore.store.validation import FieldError

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_INTERNAL = "The call failed on the server and was not acknowledged. The cause was logged."


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a class of errors is presented. `detail` replaces the error's message if that message is meant for the operator."""

    status: int
    name: str
    title: str
    detail: str = ""
    retry_after: int | None = None  # seconds


_UNAVAILABLE = Kind(
    status=503,
    name="unavailable",
    title="The store is unavailable at the moment",
    detail="The call was not acknowledged. Repeat it later; with the same Idempotency-Key, repeating is harmless.",
    retry_after=5,
)
_BROKEN = Kind(
    status=503,
    name="deployment-broken",
    title="The deployment is broken",
    detail="The call was not acknowledged. The operator has to repair the deployment; the cause was logged.",
    retry_after=60,
)
#: The first class in an error's method resolution order that is a key here decides.
_KINDS: Mapping[type[Exception], Kind] = {
    InvalidOperations: Kind(
        status=422, name="invalid-operations", title="Some operations are invalid; nothing was stored"
    ),
    PayloadTooLarge: Kind(status=413, name="too-large", title="The request is too large"),
    InvalidRequest: Kind(status=422, name="invalid-request", title="The call is invalid"),
    FieldError: Kind(status=422, name="invalid-request", title="The call is invalid"),
    RequestValidationError: Kind(status=422, name="invalid-request", title="The call is invalid"),
    RequestConflict: Kind(status=409, name="request-conflict", title="The idempotency key cannot be used again"),
    NotFound: Kind(status=404, name="not-found", title="Not found"),
    Unavailable: _UNAVAILABLE,
    DeploymentBroken: _BROKEN,
    MdstoreError: Kind(status=500, name="internal", title="Internal error", detail=_INTERNAL),
    ClientDisconnect: Kind(
        status=400,
        name="incomplete",
        title="The body is incomplete",
        detail="The connection ended early. Send the call again.",
    ),
    Exception: Kind(status=500, name="internal", title="Internal error", detail=_INTERNAL),
}


#: The errors that are answered and not raised any further. The server logs all others, after their answer.
EXPECTED: tuple[type[Exception], ...] = (HTTPException, *(kind for kind in _KINDS if kind is not Exception))


def install(api: FastAPI) -> None:
    """Answer every error of `api` with a problem document."""
    kinds: tuple[type[Exception], ...] = (Exception, *EXPECTED)
    for kind in kinds:
        api.add_exception_handler(kind, _on_error)


def answer(
    request: Request,
    *,
    status: int,
    title: str,
    detail: str,
    name: str = "",
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    """Return a response with a problem document; `more` are its extension members."""
    document = {
        "type": f"urn:mdstore:problem:{name}" if name else "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": quote(request.scope["path"]),
        **more,
    }
    return Response(exactjson.dumps(document), status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of problem documents with these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def answer_to(request: Request, error: Exception) -> Response:
    """Return the response to an error."""
    if isinstance(error, HTTPException):
        return _answer_to_http_error(request, error)
    kind = next(_KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in _KINDS)
    if kind.status >= 500:
        logger.error("%s %r: %s", request.method, request.scope["path"], kind.name, exc_info=error)
    headers = {"Retry-After": str(kind.retry_after)} if kind.retry_after else {}
    more = _field_errors(error) if kind.status == 422 else {}
    detail = kind.detail or _detail(error)
    return answer(request, status=kind.status, title=kind.title, detail=detail, name=kind.name, headers=headers, **more)


async def _on_error(request: Request, error: Exception) -> Response:
    return answer_to(request, error)


def _answer_to_http_error(request: Request, error: HTTPException) -> Response:
    phrase = HTTPStatus(error.status_code).phrase
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":  # HEAD is answered wherever GET is
        headers["Allow"] = "GET, HEAD"
    return answer(request, status=error.status_code, title=phrase, detail=error.detail, headers=headers)


def _detail(error: Exception) -> str:
    if isinstance(error, NotFound) and error.kind not in ("request", "record"):
        return "Data that this call needs does not exist, or no longer exists."
    if isinstance(error, RequestValidationError):
        return "; ".join(f"{found['field']}: {found['reason']}" for found in _field_errors(error)["errors"])
    return str(error)


def _field_errors(error: Exception) -> dict[str, Any]:
    match error:
        case InvalidOperations():
            found = [_field_error(problem.field, problem.reason, problem.index) for problem in error.problems]
            return {"errors": found, "count": error.count}
        case InvalidRequest():
            found = [_field_error(error.field, f"expected {error.expected}")]
        case FieldError():
            found = [_field_error(error.field, error.why)]
        case RequestValidationError():
            found = [_field_error(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
        case _:
            found = []
    return {"errors": found, "count": len(found)}


def _field_error(field: str, reason: str, index: int | None = None) -> dict[str, Any]:
    return {"index": index, "field": field, "reason": reason}
