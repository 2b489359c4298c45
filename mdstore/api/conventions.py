"""HTTP conventions that apply to every call, whatever its route."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mdstore.api import problems
from mdstore.errors import InvalidRequest

#: Headers that take one value. If one comes twice, some servers use the first value and others the last.
_SINGLE_HEADERS = ("Authorization", "Content-Encoding", "Content-Type", "Idempotency-Key")


class Conventions:
    """ASGI middleware: answers HEAD as GET, and refuses a body whose length is given in two ways.

    Such a body may end at one place for a proxy and at another for this server, which would take the rest for another call
    (RFC 9112, 6.1). The connection is closed after the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        app = self._app
        if scope["type"] == "http":
            names = {name for name, _ in scope["headers"]}
            if b"content-length" in names and b"transfer-encoding" in names:
                detail = "Send either Content-Length or Transfer-Encoding."
                app = problems.answer(
                    Request(scope), status=400, title="Bad Request", detail=detail, headers={"Connection": "close"}
                )
            elif scope["method"] == "HEAD":  # the server keeps the original scope, and sends no body
                scope = {**scope, "method": "GET"}
        await app(scope, receive, send)


async def check_repetitions(request: Request) -> None:
    """Raise `InvalidRequest` if a header or a query parameter that takes one value is given with different values."""
    for name in _SINGLE_HEADERS:
        _check_single(name, request.headers.getlist(name))
    for name in request.query_params:
        _check_single(name, request.query_params.getlist(name))


def _check_single(name: str, values: Sequence[str]) -> None:
    if len(set(values)) > 1:  # the values are not shown, because they may be secret
        raise InvalidRequest(field=name, value=f"{len(values)} different ones", expected="one value")
