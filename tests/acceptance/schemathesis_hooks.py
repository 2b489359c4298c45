"""The API's rules that JSON Schema cannot express: schemathesis loads these hooks, which leave out cases that break them."""

from __future__ import annotations

from typing import Any

import msgspec
import schemathesis

from mdstore.aws.dynamodb.attributes import Unstorable, to_attribute
from mdstore.store.packing import MAX_ACTIONS
from mdstore.store.validation import MAX_KEY_BYTES


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Keep the cases that are meant to be wrong, and of the others those that follow the rules."""
    _ = context
    meta = case.meta
    if meta is not None and meta.generation.mode.is_negative:
        return True
    body: Any = case.body
    if isinstance(body, bytes):  # NDJSON: the document only says that it is text
        return False
    operations: Any = body.get("operations", []) if isinstance(body, dict) else []
    return (
        # Cursors of records are opaque; those of outcomes have a pattern.
        ("cursor" not in (case.query or {}) or case.path.endswith("/outcomes"))
        and (case.query or {}).get("newest_wins") not in (True, "true")
        and len(str((case.path_parameters or {}).get("key", "")).encode()) <= MAX_KEY_BYTES
        and all(map(_is_storable, operations))
        and _groups_apply(operations)
        # JSON Schema takes 1.0 for an integer.
        and not any(
            isinstance(value, float) for one in operations for value in (one.get("expect_version"), one.get("sequence"))
        )
    )


def _is_storable(operation: dict[str, Any]) -> bool:
    try:
        to_attribute(msgspec.json.decode(msgspec.json.encode(operation.get("data"))))
    except Unstorable:
        return False
    return len(operation["key"].encode()) <= MAX_KEY_BYTES


def _groups_apply(operations: list[dict[str, Any]]) -> bool:
    keys = [(one["group"], one["entity"], one["key"]) for one in operations if one.get("group") is not None]
    return len(keys) == len(set(keys)) <= MAX_ACTIONS
