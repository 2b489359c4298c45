"""What each op does to its record: the DynamoDB action that does it, and how to tell from the old item why it did not.

The two are twins: `action` puts the rules into a condition, `judge` reads the same rules against the item that failed it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec

from mdstore.blobs import Blob
from mdstore.dynamo.marshal import AttributeValue, Item, from_attribute, to_attribute
from mdstore.model import Indexed, OpName, Reason
from mdstore.records import primary_key

_EXISTS = "attribute_exists(pk) AND attribute_not_exists(#deleted)"
_ABSENT = "(attribute_not_exists(pk) OR attribute_exists(#deleted))"
_NEWER = "(attribute_not_exists(#sequence) OR #sequence < :sequence)"
_NEEDS_RECORD = frozenset({"update", "patch", "delete", "check"})
_MAY_CREATE = frozenset({"insert", "upsert"})  # a tombstone may expire at any moment
_NAME = re.compile("#([a-z_]+)")
_ZERO, _ONE, _TRUE = {"N": "0"}, {"N": "1"}, {"BOOL": True}

#: What a record's data becomes: DynamoDB JSON, as text or not, or a pointer.
Data = msgspec.Raw | AttributeValue | Blob


class Stamp:
    """Who writes, and when: `updated_at` and the tombstones' `expires_at` in Unix milliseconds and seconds."""

    def __init__(self, *, table: str, updated_by: str, updated_at: int, tombstone_expires_at: int) -> None:
        self.table = table
        self.updated_by = {"S": updated_by}
        self.updated_at = {"N": str(updated_at)}
        self.tombstone_expires_at = {"N": str(tombstone_expires_at)}


def action(
    operation: Indexed, data: Data, stamp: Stamp, *, based_on: int | None = None, over_tombstone: bool = False
) -> dict[str, Any]:
    """The action of one operation, in DynamoDB JSON.

    `data` is what the record becomes. `based_on` is the version that a patch was computed from; the write is cancelled
    when the record has moved on since. An insert is a plain put, the cheapest action there is, unless a former try has
    found a tombstone in its place, whose version it must go on counting.
    """
    if operation.op == "insert" and not over_tombstone:
        return {"Put": _put(operation, data, stamp)}
    expected = operation.expect_version if based_on is None else based_on
    shape = _shape(
        operation.op,
        has_expected=expected is not None,
        has_sequence=operation.sequence is not None,
        is_blob=isinstance(data, Blob),
    )
    body: dict[str, Any] = {
        "TableName": stamp.table,
        "Key": {"pk": {"S": primary_key(operation.entity, operation.key)}},
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        **shape,
    }
    values = _values(operation, data, stamp, expected)
    if values:
        body["ExpressionAttributeValues"] = values
    return {"ConditionCheck" if operation.op == "check" else "Update": body}


def judge(operation: Indexed, old: Item | None) -> tuple[Reason, str] | None:
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


def _put(operation: Indexed, data: Data, stamp: Stamp) -> dict[str, Any]:
    item: dict[str, Any] = {
        "pk": {"S": primary_key(operation.entity, operation.key)},
        "entity": {"S": operation.entity},
        "key": {"S": operation.key},
        "version": _ONE,
        "updated_at": stamp.updated_at,
        "updated_by": stamp.updated_by,
    }
    if operation.sequence is not None:
        item["sequence"] = {"N": str(operation.sequence)}
    if isinstance(data, Blob):
        item["blob"] = _pointer(data)
    else:
        item["data"] = data
    return {
        "TableName": stamp.table,
        "Item": item,
        "ConditionExpression": "attribute_not_exists(pk)",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


@cache
def _shape(op: OpName, *, has_expected: bool, has_sequence: bool, is_blob: bool) -> dict[str, Any]:
    """The expressions of an operation, which depend on its kind and not on its values; `_values` is their twin."""
    shape: dict[str, Any] = {}
    conditions = _conditions(op, has_expected=has_expected, has_sequence=has_sequence)
    if conditions:
        shape["ConditionExpression"] = " AND ".join(conditions)
    if op != "check":
        shape["UpdateExpression"] = _update(op, has_sequence=has_sequence, is_blob=is_blob)
    names = sorted(set(_NAME.findall(" ".join(shape.values()))))
    shape["ExpressionAttributeNames"] = {f"#{name}": name for name in names}
    return shape


def _conditions(op: OpName, *, has_expected: bool, has_sequence: bool) -> list[str]:
    conditions: list[str] = []
    if op == "insert":
        conditions.append(_ABSENT)
    elif op in _NEEDS_RECORD or has_expected:
        conditions.append(_EXISTS)
    if has_expected:
        conditions.append("#version = :expected")
    if has_sequence:
        conditions.append(_NEWER)
    return conditions


def _update(op: OpName, *, has_sequence: bool, is_blob: bool) -> str:
    changes = ["#version = if_not_exists(#version, :zero) + :one", *_set("updated_at", "updated_by")]
    if op in _MAY_CREATE:
        changes += _set("entity", "key")
    if has_sequence:
        changes += _set("sequence")
    if op == "delete":
        changes += _set("deleted", "expires_at")
        removed = "#data, #blob"
    elif is_blob:
        changes += _set("blob")
        removed = "#data, #deleted, #expires_at"
    else:
        changes += _set("data")
        removed = "#blob, #deleted, #expires_at"
    return f"SET {', '.join(changes)} REMOVE {removed}"


def _set(*names: str) -> list[str]:
    return [f"#{name} = :{name}" for name in names]


def _values(operation: Indexed, data: Data, stamp: Stamp, expected: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if expected is not None:
        values[":expected"] = {"N": str(expected)}
    if operation.sequence is not None:
        values[":sequence"] = {"N": str(operation.sequence)}
    if operation.op == "check":
        return values
    values |= {":zero": _ZERO, ":one": _ONE, ":updated_at": stamp.updated_at, ":updated_by": stamp.updated_by}
    if operation.op in _MAY_CREATE:
        values |= {":entity": {"S": operation.entity}, ":key": {"S": operation.key}}
    if operation.op == "delete":
        values |= {":deleted": _TRUE, ":expires_at": stamp.tombstone_expires_at}
    elif isinstance(data, Blob):
        values[":blob"] = _pointer(data)
    else:
        values[":data"] = data
    return values


def _pointer(blob: Blob) -> AttributeValue:
    return to_attribute(msgspec.to_builtins(blob))
