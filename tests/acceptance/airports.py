"""The real data set: 28,426 airports, and the 722 changes that turn them into 28,298."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import airportsdata

from mdstore.store.records import Record

CHANGES = Path(__file__).parents[2] / "examples" / "airport-changes-20260315-20260905.jsonl"
AIRPORTS, AFTER_CHANGES = 28_426, 28_298
FINAL_SHA256 = "58aa7e6374e9eeb7515032e12fcb2a95eba60d42a18455f247521f698a309bce"


def inserts(entity: str = "airport") -> Iterator[dict[str, Any]]:
    """Yield one insert per airport; a float without a fraction becomes an integer."""
    for key, airport in airportsdata.load("ICAO").items():
        data = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in airport.items()}
        yield {"op": "insert", "entity": entity, "key": key, "data": data}


def changes(entity: str = "airport") -> Iterator[dict[str, Any]]:
    """Yield the changes of the file, in its order."""
    with CHANGES.open(encoding="utf-8") as file:
        for line in file:
            yield {**json.loads(line), "entity": entity}


def write(path: Path, operations: Iterable[dict[str, Any]]) -> str:
    """Write operations as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for operation in operations:
            file.write(json.dumps(operation, ensure_ascii=False) + "\n")
    return str(path)


def digest(data: dict[str, Any]) -> str:
    """Return the SHA-256 of `{"airport": {key: data}}` in the form in which the data set publishes it."""
    text = json.dumps({"airport": data}, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=float)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(records: Iterable[Record]) -> str:
    """Return the same digest of records that were read back."""
    return digest({record.key: record.data for record in records})
