"""Answers in JSON that rounds nothing, and moments in ISO 8601."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from mdstore import exactjson


def json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with `value` as JSON."""
    return Response(exactjson.dumps(value), status, media_type="application/json", headers=dict(headers or {}))


def moment(seconds: float | None) -> str | None:
    """A Unix time as ISO 8601 in UTC, to the millisecond; None where it is not known (None or 0)."""
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
