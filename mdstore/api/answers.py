"""Responses as JSON with exact numbers, and times in ISO 8601."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from mdstore import exactjson
from mdstore.timestamps import moment

__all__ = ["json", "moment"]


def json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with `value` as JSON."""
    return Response(exactjson.dumps(value), status, media_type="application/json", headers=dict(headers or {}))
