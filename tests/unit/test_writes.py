"""The effect of each operation on its record. DynamoDB's condition and the explanation of a rejection must agree."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.blobs import Blob
from mdstore.aws.dynamodb.attributes import Item, from_item, to_attribute, to_item
from mdstore.model import OpName, Reason
from mdstore.store.operations import Indexed, merged
from mdstore.store.writes import WriteMetadata, build_write, explain_rejection
from tests.unit.fakes import meets, updated

METADATA = WriteMetadata(
    table="records", updated_by="r1/0/7", updated_at=1_700_000_000_123, tombstone_expires_at=1_800_000_000
)
OPS: tuple[OpName, ...] = ("insert", "update", "patch", "upsert", "delete", "check")
BLOB = Blob(key="blobs/x", digest="d", size=10)

# https://www.rfc-editor.org/rfc/rfc7396#appendix-A
RFC_7396: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC_7396)
def test_patches_are_merged_as_rfc_7396_says(target: Any, patch: Any, result: Any) -> None:
    """These are all test cases of RFC 7396, appendix A. The target itself is not changed."""
    before = repr(target)
    assert merged(target, patch) == result
    assert repr(target) == before


def old_item(version: int, sequence: int | None, *, deleted: bool = False) -> Item:
    state: dict[str, Any] = {"deleted": True, "expires_at": 5} if deleted else {"data": {"n": 1}}
    return to_item({"pk": "e#k", "entity": "e", "key": "k", "version": version, "sequence": sequence, **state})


def operation_of(op: OpName, expect_version: int | None = None, sequence: int | None = None) -> Indexed:
    return Indexed(index=0, op=op, entity="e", key="k", expect_version=expect_version, sequence=sequence)


ABSENT, LIVE, TOMBSTONE = "absent", "live", "tombstone"
ITEMS: dict[str, Item | None] = {ABSENT: None, LIVE: old_item(3, 100), TOMBSTONE: old_item(3, 100, deleted=True)}
MISSING = (Reason.MISSING, "there is no record")
NOT_3 = (Reason.VERSION_MISMATCH, "the record has version 3")
NO_VERSION = (Reason.VERSION_MISMATCH, "there is no record")
STALE = (Reason.STALE, "the record has sequence 100")
Rejection = tuple[Reason, str] | None

PLAIN: list[tuple[OpName, str, Rejection]] = [
    ("insert", ABSENT, None),
    ("insert", LIVE, (Reason.EXISTS, "the record has version 3")),
    ("insert", TOMBSTONE, None),
    ("upsert", ABSENT, None),
    ("upsert", LIVE, None),
    ("upsert", TOMBSTONE, None),
    *(
        (op, state, None if state == LIVE else MISSING)
        for op in OPS
        if op not in ("insert", "upsert")
        for state in ITEMS
    ),
]


@pytest.mark.parametrize(("op", "state", "rejection"), PLAIN)
def test_what_each_operation_needs_the_record_to_be(op: OpName, state: str, rejection: Rejection) -> None:
    """An insert needs no record, an upsert accepts either, and all others need one. A tombstone is not a record."""
    assert explain_rejection(operation_of(op), ITEMS[state]) == rejection


@pytest.mark.parametrize("op", ["update", "patch", "delete", "check"])
@pytest.mark.parametrize(
    ("state", "version", "rejection"),
    [(LIVE, 3, None), (LIVE, 2, NOT_3), (LIVE, 4, NOT_3), (ABSENT, 3, MISSING), (TOMBSTONE, 3, MISSING)],
)
def test_the_expected_version_must_be_the_record_s(op: OpName, state: str, version: int, rejection: Rejection) -> None:
    """The expected version is that of a live record; a tombstone's version does not count."""
    assert explain_rejection(operation_of(op, expect_version=version), ITEMS[state]) == rejection


@pytest.mark.parametrize(
    ("state", "version", "rejection"),
    [(LIVE, 3, None), (LIVE, 2, NOT_3), (ABSENT, 1, NO_VERSION), (TOMBSTONE, 3, NO_VERSION)],
)
def test_an_upsert_with_a_version_needs_a_record(state: str, version: int, rejection: Rejection) -> None:
    """A caller that expects a version expects a record."""
    assert explain_rejection(operation_of("upsert", expect_version=version), ITEMS[state]) == rejection


@pytest.mark.parametrize("op", ["insert", "update", "patch", "upsert", "delete"])
@pytest.mark.parametrize("state", [LIVE, TOMBSTONE])
@pytest.mark.parametrize(("sequence", "stale"), [(99, True), (100, True), (101, False)])
def test_an_older_or_equal_sequence_is_stale(op: OpName, state: str, sequence: int, stale: bool) -> None:
    """A tombstone keeps its sequence, so that a late message does not recreate the record."""
    found = explain_rejection(operation_of(op, sequence=sequence), ITEMS[state])
    assert (found == STALE) == stale
    if not stale:
        assert found == explain_rejection(operation_of(op), ITEMS[state])


@pytest.mark.parametrize("op", ["update", "patch", "upsert", "delete"])
def test_a_record_without_a_sequence_accepts_any(op: OpName) -> None:
    """The first sequence of a record is the newest."""
    assert explain_rejection(operation_of(op, sequence=-5), old_item(3, None)) is None


operations = st.builds(
    operation_of, st.sampled_from(OPS), st.none() | st.integers(1, 3), st.none() | st.integers(-1, 3)
).filter(
    lambda one: not (one.op == "insert" and one.expect_version) and not (one.op == "check" and one.sequence is not None)
)
items = st.none() | st.builds(old_item, st.integers(1, 3), st.none() | st.integers(-1, 3), deleted=st.booleans())


def body_of(operation: Indexed, data: Any = None, based_on: int | None = None) -> dict[str, Any]:
    """Return the body of the action. That of an insert is the update which continues a tombstone's version."""
    ((kind, body),) = build_write(operation, data, METADATA, based_on=based_on, over_tombstone=True).items()
    assert kind == ("ConditionCheck" if operation.op == "check" else "Update")
    assert body["TableName"] == "records"
    assert body["Key"] == {"pk": {"S": "e#k"}}
    assert body["ReturnValuesOnConditionCheckFailure"] == "ALL_OLD"
    found: dict[str, Any] = body
    return found


@pytest.mark.parametrize("data", [to_attribute({"n": 2}), BLOB], ids=["inline", "pointer"])
@pytest.mark.parametrize("sequence", [None, 0, 7])
def test_a_first_insert_is_a_plain_put(data: Any, sequence: int | None) -> None:
    """The cheapest action writes the same record as an update would, and succeeds only if there is no item."""
    operation = operation_of("insert", sequence=sequence)
    ((kind, put),) = build_write(operation, data, METADATA).items()
    assert kind == "Put"
    assert put["Item"] == updated(None, body_of(operation, data))
    assert put["ReturnValuesOnConditionCheckFailure"] == "ALL_OLD"
    assert {state: meets(put, item) for state, item in ITEMS.items()} == {ABSENT: True, LIVE: False, TOMBSTONE: False}


@settings(deadline=None, max_examples=300)
@given(operations, items)
def test_the_condition_and_the_explanation_agree(operation: Indexed, item: Item | None) -> None:
    """DynamoDB accepts an operation exactly if `explain_rejection` finds no reason to refuse it."""
    assert meets(body_of(operation, {"M": {}}), item) == (explain_rejection(operation, item) is None)


@settings(deadline=None, max_examples=100)
@given(operations.map(lambda one: msgspec.structs.replace(one, op="patch")), items, st.integers(1, 3))
def test_a_patch_applies_only_to_the_version_it_was_merged_into(
    operation: Indexed, item: Item | None, based_on: int
) -> None:
    """If the record has changed since, the write is cancelled, whatever the operation expects."""
    passes = meets(body_of(operation, {"M": {}}, based_on), item)
    live = item is not None and "deleted" not in item
    if passes:
        assert item is not None
        assert item["version"] == {"N": str(based_on)}
    if (
        live
        and item is not None
        and item["version"] == {"N": str(based_on)}
        and explain_rejection(operation, item) is None
    ):
        assert passes


@settings(deadline=None, max_examples=200)
@given(operations, st.sampled_from([None, {"M": {}}, BLOB]), st.none() | st.integers(1, 9))
def test_names_and_values_are_both_used_and_declared(operation: Indexed, data: Any, based_on: int | None) -> None:
    """DynamoDB refuses a name or value that is used and not declared, or declared and not used."""
    if (data is None) != (operation.op in ("delete", "check")):
        data = {"M": {}} if data is None else None
    body = body_of(operation, data, based_on if operation.op == "patch" else None)
    text = body.get("UpdateExpression", "") + " " + body.get("ConditionExpression", "")
    names, found = body.get("ExpressionAttributeNames", {}), body.get("ExpressionAttributeValues", {})
    assert set(re.findall(r"#\w+", text)) == names.keys()
    assert set(re.findall(r":\w+", text)) == found.keys()
    assert all(name == f"#{real}" for name, real in names.items())
    assert {} not in (body.get("ExpressionAttributeNames"), body.get("ExpressionAttributeValues"))
    assert all(len(value) == 1 for value in found.values())


def effect(operation: Indexed, old: Item | None, data: Any = None) -> dict[str, Any]:
    return from_item(updated(old, body_of(operation, data)))


WRITES: list[tuple[OpName, str]] = [
    *(("insert", state) for state in (ABSENT, TOMBSTONE)),
    *(("upsert", state) for state in ITEMS),
    ("update", LIVE),
    ("patch", LIVE),
]


@pytest.mark.parametrize(("op", "state"), WRITES)
def test_a_write_makes_a_complete_record(op: OpName, state: str) -> None:
    """Data is replaced, nothing of a tombstone stays, and the version is incremented."""
    old = ITEMS[state]
    assert effect(operation_of(op, sequence=700), old, to_attribute({"n": 2})) == {
        "pk": "e#k",
        "entity": "e",
        "key": "k",
        "data": {"n": 2},
        "version": 4 if old else 1,
        "sequence": 700,
        "updated_at": 1_700_000_000_123,
        "updated_by": "r1/0/7",
    }


def test_an_operation_without_sequence_keeps_the_record_s() -> None:
    """A sequence never decreases, so an operation without one does not remove the record's."""
    assert effect(operation_of("update"), old_item(3, 5), to_attribute({}))["sequence"] == 5


def test_data_and_pointer_replace_each_other() -> None:
    """A record has data or a pointer to a blob, never both."""
    with_blob = updated(old_item(3, None), body_of(operation_of("update"), BLOB))
    assert "data" not in with_blob
    assert from_item(with_blob)["blob"] == {"key": "blobs/x", "digest": "d", "size": 10}
    assert "blob" not in effect(operation_of("update"), with_blob, to_attribute({}))


@pytest.mark.parametrize("sequence", [None, 7])
def test_a_delete_leaves_a_tombstone(sequence: int | None) -> None:
    """Data is removed; version and sequence stay until the tombstone expires."""
    found = effect(operation_of("delete", sequence=sequence), old_item(3, 5))
    assert found["deleted"] is True
    assert found["expires_at"] == 1_800_000_000
    assert (found["version"], found["sequence"]) == (4, sequence or 5)
    assert not {"data", "blob"} & found.keys()


def test_a_check_changes_nothing() -> None:
    """A check is a condition without an update."""
    assert "UpdateExpression" not in body_of(operation_of("check", expect_version=2))
