"""Responses as JSON with exact numbers, and times in ISO 8601."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from mdstore import exactjson


def json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with `value` as JSON."""
    return Response(exactjson.dumps(value), status, media_type="application/json", headers=dict(headers or {}))


def moment(seconds: float | None) -> str | None:
    """Format a Unix time as ISO 8601 in UTC, to the millisecond. An unknown time (None or 0) becomes None."""
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
