"""The records that every contender writes: about 200 bytes of JSON each."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

RECORD: dict[str, Any] = {
    "icao": "00AR", "iata": "", "name": "Arland Airport", "city": "Bennington", "subd": "Kansas", "country": "US",
    "elevation": 1352, "lat": Decimal("38.96966"), "lon": Decimal("-97.601562"), "tz": "America/Chicago",
}  # fmt: skip


def operations(count: int, run: str) -> Iterator[dict[str, Any]]:
    """Yield `count` inserts. The keys contain the run's id, so that runs do not share records."""
    return ({"op": "insert", "entity": "bench", "key": f"{run}-{number}", "data": RECORD} for number in range(count))


def items(start: int, end: int, run: str) -> list[dict[str, Any]]:
    """Return the items that operations `start` to `end` produce, for contenders that write items directly."""
    return [
        {
            "pk": f"bench#{run}-{number}",
            "entity": "bench",
            "key": f"{run}-{number}",
            "version": 1,
            "data": RECORD,
            "updated_at": 1_764_000_000_000,
            "updated_by": run,
        }
        for number in range(start, end)
    ]
