"""Serves the most frequent calls without FastAPI's routing and solving of dependencies, which take most of a small call's time.

Only calls without anything unusual are served here. All others go on to FastAPI, whose routes call the same functions, and so
give the same answers: calls with a key that is not cached, with a header twice, or with parameters that need checks.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping

from fastapi import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from mdstore.api import problems, records, requests
from mdstore.store.api_keys import ApiKey
from mdstore.store.api_keys import Scope as KeyScope

_Headers = Mapping[bytes, bytes]
_RECORD = compile_path("/v1/records/{entity}/{key:path}")[0]
_REQUEST = "/v1/requests/"
_SIMPLE_QUERY = re.compile(rb"(?:wait=(\d{1,4}(?:\.\d{1,6})?))?")


class FastPaths:
    """ASGI middleware: serves reads of a record or of a request's state, and submits requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        call = _call_of(scope, receive) if scope["type"] == "http" else None
        if call is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await call
        except problems.EXPECTED as error:
            response = problems.answer_to(Request(scope), error)
        await response(scope, receive, send)


def _call_of(scope: Scope, receive: Receive) -> Awaitable[Response] | None:
    """Return what answers the call, or None if FastAPI has to."""
    path = _route_path(scope)
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if not path.startswith("/v1/") or len(headers) < len(scope["headers"]):  # a header comes twice
        return None
    if scope["method"] == "POST":
        return _submit(scope, receive, headers) if path == "/v1/requests" else None
    if scope["method"] == "GET" and not scope["query_string"]:
        return _read(scope, path, headers)
    return None


def _read(scope: Scope, path: str, headers: _Headers) -> Awaitable[Response] | None:
    if found := _RECORD.match(path):
        return _record(scope, headers, found["entity"], found["key"])
    if path.startswith(_REQUEST) and not path.endswith("/outcomes"):
        return _state(scope, headers, path.removeprefix(_REQUEST))
    return None


def _route_path(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _submit(scope: Scope, receive: Receive, headers: _Headers) -> Awaitable[Response] | None:
    query = _SIMPLE_QUERY.fullmatch(scope["query_string"])
    key = _key(scope, headers, KeyScope.WRITE)
    if query is None or key is None:
        return None
    return requests.submit(
        request=Request(scope, receive),
        client=scope["app"].state.async_client,
        key=key,
        wait=float(query[1] or 0),
        idempotency_key=_text(headers, b"idempotency-key"),
    )


def _record(scope: Scope, headers: _Headers, entity: str, name: str) -> Awaitable[Response] | None:
    key = _key(scope, headers, KeyScope.READ)
    if key is None:
        return None
    tags = _text(headers, b"if-none-match")
    return records.record(scope["app"].state.async_client, key, entity, name, None if tags is None else [tags])


def _state(scope: Scope, headers: _Headers, request_id: str) -> Awaitable[Response] | None:
    key = _key(scope, headers, KeyScope.READ)
    return None if key is None else requests.state(scope["app"].state.async_client, key, request_id)


def _key(scope: Scope, headers: _Headers, needed: KeyScope) -> ApiKey | None:
    """Return the caller's key if it is cached and has the scope that the call needs."""
    scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    found: ApiKey | None = scope["app"].state.client.store.api_keys.cached(secret.decode("latin-1"))
    return found if found is not None and needed in found.scopes else None


def _text(headers: _Headers, name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")
