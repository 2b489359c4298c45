"""Times as text: ISO 8601 in UTC, to the millisecond. The HTTP API and `--json` use the same form."""

from __future__ import annotations

from datetime import UTC, datetime


def moment(seconds: float | None) -> str | None:
    """Format a Unix time. An unknown time (None or 0) becomes None."""
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
