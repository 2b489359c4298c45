"""The calls of the HTTP API that are measured."""

from __future__ import annotations

from benchmarks.load import NUMBER, http_call
from benchmarks.records import RECORD
from mdstore import exactjson
from mdstore.settings import Settings
from mdstore.store import Store


def api_key(settings: Settings, source: str = "bench") -> str:
    """Create an API key."""
    return Store(settings).api_keys.create(source=source, scopes=["write", "read"])


def post(key: str) -> str:
    """Return the call that submits a request of one operation, whose record is that of the call's number."""
    operation = {"op": "insert", "entity": "bench", "key": f"small-{NUMBER}", "data": RECORD}
    body = exactjson.dumps({"operations": [operation]}).decode()
    return http_call("POST", "/v1/requests", body, authorization=f"Bearer {key}", content_type="application/json")


def get(key: str) -> str:
    """Return the call that reads the record of the call's number."""
    return http_call("GET", f"/v1/records/bench/small-{NUMBER}", authorization=f"Bearer {key}")
