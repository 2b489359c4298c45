"""What each op does to its record: the DynamoDB action that does it, and how to tell from the old item why it did not.

The two are twins: `action` puts the rules into a condition, `judge` reads the same rules against the item that failed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from mdstore.blobs import Blob
from mdstore.dynamo.marshal import Item, from_attribute, to_attribute, to_item
from mdstore.model import Operation, Reason
from mdstore.records import primary_key

_EXISTS = "attribute_exists(pk) AND attribute_not_exists(#deleted)"
_ABSENT = "(attribute_not_exists(pk) OR attribute_exists(#deleted))"
_NEWER = "(attribute_not_exists(#sequence) OR #sequence < :sequence)"
_NAMES = {
    f"#{name}": name
    for name in (
        "entity",
        "key",
        "data",
        "blob",
        "version",
        "sequence",
        "updated_at",
        "updated_by",
        "deleted",
        "expires_at",
    )
}
_NEEDS_RECORD = frozenset({"update", "patch", "delete", "check"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """Who writes, and when: `updated_at` and the tombstones' `expires_at` in Unix milliseconds and seconds."""

    table: str
    updated_by: str
    updated_at: int
    tombstone_expires_at: int


def action(
    operation: Operation,
    data: Any | Blob,
    stamp: Stamp,
    *,
    based_on: int | None = None,
    over_tombstone: bool = False,
) -> dict[str, Any]:
    """The action of one operation, in DynamoDB JSON.

    `data` is what the record becomes: marshalled data, or a pointer to it. `based_on` is the version that a patch was
    computed from; the write is cancelled when the record has moved on since. An insert is a plain put, the cheapest
    action there is, unless a former try has found a tombstone in its place, whose version it must go on counting.
    """
    if operation.op == "insert" and not over_tombstone:
        return {"Put": _put(operation, data, stamp)}
    conditions, values = _conditions(operation, based_on)
    body: dict[str, Any] = {
        "TableName": stamp.table,
        "Key": {"pk": {"S": primary_key(operation.entity, operation.key)}},
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
    if conditions:
        body["ConditionExpression"] = " AND ".join(conditions)
    expression = ""
    if operation.op != "check":
        expression, more = _change(operation, data, stamp)
        body["UpdateExpression"] = expression
        values |= more
    used = expression + " " + body.get("ConditionExpression", "")
    body["ExpressionAttributeNames"] = {name: real for name, real in _NAMES.items() if name in used}
    if values:
        body["ExpressionAttributeValues"] = values
    return {"ConditionCheck" if operation.op == "check" else "Update": body}


def judge(operation: Operation, old: Item | None) -> tuple[Reason, str] | None:
    """Why the operation is refused, given the item as it is. None: nothing refuses it (any more)."""
    exists = old is not None and "deleted" not in old
    version = from_attribute(old["version"]) if old else None
    sequence = from_attribute(old["sequence"]) if old and "sequence" in old else None
    if operation.sequence is not None and sequence is not None and sequence >= operation.sequence:
        return Reason.STALE, f"the record has sequence {sequence}"
    if operation.op == "insert" and exists:
        return Reason.EXISTS, f"the record has version {version}"
    if operation.op in _NEEDS_RECORD and not exists:
        return Reason.MISSING, "there is no record"
    if operation.expect_version is not None and (not exists or version != operation.expect_version):
        return Reason.VERSION_MISMATCH, f"the record has version {version}" if exists else "there is no record"
    return None


def merged(target: Any, patch: Any) -> Any:
    """JSON Merge Patch (RFC 7396): objects merge, null removes, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def _put(operation: Operation, data: Any | Blob, stamp: Stamp) -> dict[str, Any]:
    item = to_item(
        {
            "pk": primary_key(operation.entity, operation.key),
            "entity": operation.entity,
            "key": operation.key,
            "version": 1,
            "sequence": operation.sequence,
            "updated_at": stamp.updated_at,
            "updated_by": stamp.updated_by,
        }
    )
    if isinstance(data, Blob):
        item["blob"] = to_attribute(msgspec.to_builtins(data))
    else:
        item["data"] = data
    return {
        "TableName": stamp.table,
        "Item": item,
        "ConditionExpression": "attribute_not_exists(pk)",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


def _conditions(operation: Operation, based_on: int | None) -> tuple[list[str], Item]:
    conditions: list[str] = []
    values: Item = {}
    if operation.op == "insert":
        conditions.append(_ABSENT)
    elif operation.op in _NEEDS_RECORD or operation.expect_version is not None:
        conditions.append(_EXISTS)
    expected = operation.expect_version if based_on is None else based_on
    if expected is not None:
        conditions.append("#version = :expected")
        values[":expected"] = to_attribute(expected)
    if operation.sequence is not None:
        conditions.append(_NEWER)
    return conditions, values


def _change(operation: Operation, data: Any | Blob, stamp: Stamp) -> tuple[str, Item]:
    changes = [
        "#version = if_not_exists(#version, :zero) + :one",
        "#updated_at = :updated_at",
        "#updated_by = :updated_by",
    ]
    values: dict[str, Any] = {":zero": 0, ":one": 1, ":updated_at": stamp.updated_at, ":updated_by": stamp.updated_by}
    changes += ["#entity = :entity", "#key = :key"]
    values |= {":entity": operation.entity, ":key": operation.key}
    if operation.sequence is not None:
        changes.append("#sequence = :sequence")
        values[":sequence"] = operation.sequence
    item = to_item(values)
    if operation.op == "delete":
        changes += ["#deleted = :deleted", "#expires_at = :expires_at"]
        item |= to_item({":deleted": True, ":expires_at": stamp.tombstone_expires_at})
        removed = "#data, #blob"
    elif isinstance(data, Blob):
        changes.append("#blob = :blob")
        item[":blob"] = to_attribute(msgspec.to_builtins(data))
        removed = "#data, #deleted, #expires_at"
    else:
        changes.append("#data = :data")
        item[":data"] = data
        removed = "#blob, #deleted, #expires_at"
    return f"SET {', '.join(changes)} REMOVE {removed}", item
