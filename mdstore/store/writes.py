"""Builds the write of each operation, and explains why DynamoDB rejected it.

`build_write` expresses the rules as a condition. `explain_rejection` applies the same rules to the item that failed the
condition. Change them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec

from mdstore.aws.blobs import Blob
from mdstore.aws.dynamodb.attributes import AttributeValue, Item, from_attribute, to_attribute
from mdstore.aws.dynamodb.updates import expressions, given
from mdstore.model import OpName, Reason
from mdstore.store.operations import OPERATIONS, Effect, Indexed, Needs, OperationSpec
from mdstore.store.records import primary_key

_EXISTS = "attribute_exists(pk) AND attribute_not_exists(#deleted)"
_ABSENT = "(attribute_not_exists(pk) OR attribute_exists(#deleted))"
_NEWER = "(attribute_not_exists(#sequence) OR #sequence < :sequence)"
_REQUIRES = {Needs.ABSENT: _ABSENT, Needs.PRESENT: _EXISTS}
_ZERO, _ONE, _TRUE = {"N": "0"}, {"N": "1"}, {"BOOL": True}

#: The data to write to a record: DynamoDB JSON, either encoded or as values, or a pointer to data in S3.
Data = msgspec.Raw | AttributeValue | Blob


class WriteMetadata:
    """Who writes, and when. `updated_at` is in Unix milliseconds, `tombstone_expires_at` in Unix seconds."""

    def __init__(self, *, table: str, updated_by: str, updated_at: int, tombstone_expires_at: int) -> None:
        self.table = table
        self.updated_by = {"S": updated_by}
        self.updated_at = {"N": str(updated_at)}
        self.tombstone_expires_at = {"N": str(tombstone_expires_at)}


def build_write(
    operation: Indexed,
    data: Data,
    metadata: WriteMetadata,
    *,
    based_on: int | None = None,
    over_tombstone: bool = False,
) -> dict[str, Any]:
    """Build the action of one operation, in DynamoDB JSON.

    `data` is the record's new data. `based_on` is the record version that a patch was merged into: DynamoDB cancels the write
    if the version has changed since. An insert is a put, the cheapest action, until an attempt finds a tombstone there. Then
    `over_tombstone` makes it an update, which continues the tombstone's version.
    """
    spec = OPERATIONS[operation.op]
    if spec.needs is Needs.ABSENT and not over_tombstone:
        return {"Put": _put(operation, data, metadata)}
    expected = operation.expect_version if based_on is None else based_on
    shape = _shape(
        operation.op,
        has_expected=expected is not None,
        has_sequence=operation.sequence is not None,
        is_blob=isinstance(data, Blob),
    )
    values = _values(operation, data, metadata, expected)
    return {"Update" if spec.writes else "ConditionCheck": _body(operation, metadata, shape, values)}


def build_folded_write(fold: Sequence[Indexed], data: Data, metadata: WriteMetadata) -> dict[str, Any]:
    """Build the action of a fold: the condition of its first operation, the effect of its last, a version for each of them.

    `data` is that of the last operation.
    """
    first, last = fold[0], fold[-1]
    shape = _shape(
        last.op,
        first=first.op,
        has_expected=first.expect_version is not None,
        has_sequence=last.sequence is not None,
        is_blob=isinstance(data, Blob),
    )
    values = _values(last, data, metadata, first.expect_version)
    values |= {":count": {"N": str(len(fold))}, ":entity": {"S": last.entity}, ":key": {"S": last.key}}
    if last.sequence is not None:
        values |= {":sequence": {"N": str(first.sequence)}, ":last_sequence": {"N": str(last.sequence)}}
    return {"Update": _body(last, metadata, shape, values)}


def _body(operation: Indexed, metadata: WriteMetadata, shape: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "TableName": metadata.table,
        "Key": {"pk": {"S": primary_key(operation.entity, operation.key)}},
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        **shape,
    }
    if values:
        body["ExpressionAttributeValues"] = values
    return body


def explain_rejection(operation: Indexed, old: Item | None) -> tuple[Reason, str] | None:
    """Return why the operation is refused, given the current item. Return None if no rule refuses it, or no rule still does."""
    exists = old is not None and "deleted" not in old
    version = from_attribute(old["version"]) if old else None
    sequence = from_attribute(old["sequence"]) if old and "sequence" in old else None
    if operation.sequence is not None and sequence is not None and sequence >= operation.sequence:
        return Reason.STALE, f"the record has sequence {sequence}"
    needs = OPERATIONS[operation.op].needs_of(has_sequence=operation.sequence is not None)
    if needs is Needs.ABSENT and exists:
        return Reason.EXISTS, f"the record has version {version}"
    if needs is Needs.PRESENT and not exists:
        return Reason.MISSING, "there is no record"
    if operation.expect_version is not None and (not exists or version != operation.expect_version):
        return Reason.VERSION_MISMATCH, f"the record has version {version}" if exists else "there is no record"
    return None


def explain_rejections(fold: Sequence[Indexed], old: Item | None) -> list[tuple[Indexed, Reason, str]]:
    """Return the first operations of a fold that are refused, given the current item, and why. They do not change the item."""
    rejected: list[tuple[Indexed, Reason, str]] = []
    for operation in fold:
        rejection = explain_rejection(operation, old)
        if rejection is None:
            break
        rejected.append((operation, *rejection))
    return rejected


def _put(operation: Indexed, data: Data, metadata: WriteMetadata) -> dict[str, Any]:
    item: dict[str, Any] = {
        "pk": {"S": primary_key(operation.entity, operation.key)},
        "entity": {"S": operation.entity},
        "key": {"S": operation.key},
        "version": _ONE,
        "updated_at": metadata.updated_at,
        "updated_by": metadata.updated_by,
    }
    if operation.sequence is not None:
        item["sequence"] = {"N": str(operation.sequence)}
    if isinstance(data, Blob):
        item["blob"] = _pointer(data)
    else:
        item["data"] = data
    return {
        "TableName": metadata.table,
        "Item": item,
        "ConditionExpression": "attribute_not_exists(pk)",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


@cache
def _shape(
    op: OpName, *, has_expected: bool, has_sequence: bool, is_blob: bool, first: OpName | None = None
) -> dict[str, Any]:
    """Build the expressions of an operation, or of a fold from `first` to `op`.

    They depend only on the kinds of operations; `_values` supplies the values they name.
    """
    spec = OPERATIONS[op]
    conditions = _conditions(OPERATIONS[first or op], has_expected=has_expected, has_sequence=has_sequence)
    condition = " AND ".join(conditions)
    if not spec.writes:
        return expressions(condition=condition)
    names = ["updated_at", "updated_by"]
    if first or spec.needs_of(has_sequence=has_sequence) is not Needs.PRESENT:  # the write may create the item
        names += ["entity", "key"]
    if has_sequence:
        names.append("sequence")
    if spec.effect is Effect.REMOVE:
        names += ["deleted", "expires_at"]
        removed = ["data", "blob"]
    else:
        names.append("blob" if is_blob else "data")
        removed = ["data" if is_blob else "blob", "deleted", "expires_at"]
    values = {"version": "if_not_exists(#version, :zero) + :count"} | given(names)
    if first and has_sequence:
        values["sequence"] = ":last_sequence"  # the condition names the first one
    return expressions(set=values, remove=removed, condition=condition)


def _conditions(spec: OperationSpec, *, has_expected: bool, has_sequence: bool) -> list[str]:
    # An insert has no expected version.
    needs = Needs.PRESENT if has_expected else spec.needs_of(has_sequence=has_sequence)
    conditions = [_REQUIRES[needs]] if needs in _REQUIRES else []
    if has_expected:
        conditions.append("#version = :expected")
    if has_sequence:
        conditions.append(_NEWER)
    return conditions


def _values(operation: Indexed, data: Data, metadata: WriteMetadata, expected: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if expected is not None:
        values[":expected"] = {"N": str(expected)}
    if operation.sequence is not None:
        values[":sequence"] = {"N": str(operation.sequence)}
    spec = OPERATIONS[operation.op]
    if not spec.writes:
        return values
    values |= {":zero": _ZERO, ":count": _ONE, ":updated_at": metadata.updated_at, ":updated_by": metadata.updated_by}
    if spec.needs_of(has_sequence=operation.sequence is not None) is not Needs.PRESENT:
        values |= {":entity": {"S": operation.entity}, ":key": {"S": operation.key}}
    if spec.effect is Effect.REMOVE:
        values |= {":deleted": _TRUE, ":expires_at": metadata.tombstone_expires_at}
    elif isinstance(data, Blob):
        values[":blob"] = _pointer(data)
    else:
        values[":data"] = data
    return values


def _pointer(blob: Blob) -> AttributeValue:
    return to_attribute(msgspec.to_builtins(blob))
