"""Payloads: operations are encoded as one object and read back, and every kind of damage or forgery is detected."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mdstore import exactjson
from mdstore.aws.blobs import Blobs
from mdstore.errors import IntegrityError, NotFound, PayloadTooLarge, RequestConflict
from mdstore.model import Operation, Reason, Reference, Refusal
from mdstore.settings import Settings
from mdstore.store import payload as payload_module
from mdstore.store import payload_builder as payload_builder_module
from mdstore.store import sections
from mdstore.store.entities import Entities
from mdstore.store.operations import Indexed
from mdstore.store.partitioning import Partition
from mdstore.store.payload import MAGIC, Encoded, Header, Payloads, Section
from mdstore.store.payload_builder import OperationInput, PayloadBuilder
from mdstore.store.validation import Validator
from tests.unit.fakes import MemoryObjects, operation_of

MAX_LANE = 2**20


def sized(**changes: Any) -> Settings:
    return Settings(**{"max_lane_bytes": MAX_LANE, "max_record_bytes": MAX_LANE, "lane_bytes": MAX_LANE, **changes})


def store() -> tuple[Payloads, MemoryObjects]:
    objects = MemoryObjects()
    return Payloads(objects=objects, prefix="payloads/", max_lane_bytes=MAX_LANE), objects


@contextmanager
def built(sources: Iterable[OperationInput], **changes: Any) -> Iterator[PayloadBuilder]:
    """Add operations to a payload builder, and close it at the end."""
    settings = sized(**changes)
    builder = PayloadBuilder(
        validator=Validator(entities=Entities(), max_record_bytes=settings.max_record_bytes), settings=settings
    )
    try:
        for source in sources:
            builder.add(source)
        yield builder
    finally:
        builder.close()


@contextmanager
def encoded(
    sources: Iterable[OperationInput], *, request_id: str = "r1", source: str = "shop", **changes: Any
) -> Iterator[Encoded]:
    with built(sources, **changes) as builder:
        result = builder.encode(request_id, source)
        try:
            yield result
        finally:
            result.body.close()


def put(
    payloads: Payloads,
    sources: Iterable[OperationInput],
    *,
    request_id: str = "r1",
    source: str = "shop",
    **changes: Any,
) -> tuple[Reference, bool]:
    with encoded(sources, request_id=request_id, source=source, **changes) as one:
        reference, _, new = payloads.put(one)
        return reference, new


def upsert(key: str, group: str | None = None, **fields: Any) -> Operation:
    return Operation(op="upsert", entity="e", key=key, data=fields or {"n": 1}, group=group)


def upserts(count: int) -> list[Operation]:
    return [upsert(f"k{number}", n=number) for number in range(count)]


def read_all(payloads: Payloads, reference: Reference) -> list[Indexed]:
    found = [one for lane in range(reference.lanes) for one in payloads.lane(reference, lane)]
    return sorted(found, key=lambda one: one.index)


operations = st.lists(
    st.builds(
        Operation,
        op=st.just("upsert"),
        entity=st.sampled_from(["e", "f"]),
        key=st.sampled_from(["a", "b", "ü", "😀"]) | st.text(st.characters(exclude_categories=["C"]), min_size=1),
        data=st.dictionaries(st.text(min_size=1), st.text() | st.integers(-(10**30), 10**30) | st.none(), max_size=3),
        sequence=st.none() | st.integers(-(10**37), 10**37),
    ),
    max_size=30,
)


@hypothesis_settings(deadline=None, max_examples=60)
@given(operations, st.integers(1, 10))
def test_operations_are_read_back_exactly(given_operations: list[Operation], lane_operations: int) -> None:
    """Each operation is read back once, exactly and with its index, and the lanes keep the order of the request."""
    payloads, _ = store()
    reference, new = put(payloads, given_operations, lane_operations=lane_operations)
    assert new
    for lane in range(reference.lanes):
        indexes = [one.index for one in payloads.lane(reference, lane)]
        assert indexes
        assert indexes == sorted(indexes)
    found = read_all(payloads, reference)
    assert [(one.index, operation_of(one)) for one in found] == list(enumerate(given_operations))
    assert not any(one.data for one in found)  # all of them are small enough to be marshalled in advance
    assert payloads.header(reference).operations == len(given_operations)


def test_a_small_payload_takes_one_read() -> None:
    """One ranged read returns the header, the lane and the refusals of a small request."""
    payloads, objects = store()
    reference, _ = put(payloads, [*upserts(20), {"op": "drop"}], lane_operations=1_000)
    assert len(payloads.lane(reference, 0)) == 20
    assert len(payloads.refused(reference)) == 1
    assert [key for key, _, _ in objects.gets] == ["payloads/r1"]


def test_a_header_larger_than_the_first_read() -> None:
    """A header of more than 64 KiB takes two reads, once; each lane then takes one read."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(1_500), lane_operations=1)
    assert len(exactjson.dumps(payloads.header(reference))) > 2**16
    assert len(objects.gets) == 2
    payloads.lane(reference, 0)
    payloads.lane(reference, reference.lanes - 1)
    assert len(objects.gets) == 4
    assert [operation_of(one) for one in read_all(payloads, reference)] == upserts(1_500)


def test_a_worker_reads_only_its_own_lane() -> None:
    """The ranged read of a lane covers exactly that lane's bytes."""
    payloads, objects = store()
    noise = [upsert(f"k{number}", x=hashlib.sha512(b"%d" % number).hexdigest() * 20) for number in range(2_000)]
    reference, _ = put(payloads, noise, lane_operations=250)
    section = payloads.header(reference).lanes[3]
    del objects.gets[:]
    payloads.lane(reference, 3)
    ((_, start, end),) = objects.gets
    assert end - start == section.length < len(objects.stored["payloads/r1"]) / 4


def test_the_reference_locates_and_identifies_the_payload() -> None:
    """A reference has version, key, digest of the header, number of lanes and source."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(3))
    body = objects.stored["payloads/r1"]
    length = int.from_bytes(body[4:8], "big")
    assert reference == Reference(
        v=2,
        request_id="r1",
        payload="payloads/r1",
        digest=hashlib.sha256(body[8 : 8 + length]).hexdigest(),
        lanes=1,
        source="shop",
    )
    assert payloads.find("r1") == (reference, payloads.header(reference))


def test_encoding_is_deterministic() -> None:
    """The same operations are encoded as the same bytes, whether they are objects, mappings or lines."""
    mappings = [msgspec.to_builtins(one) for one in upserts(50)]
    variants: list[Sequence[OperationInput]] = [upserts(50), mappings, [exactjson.dumps(one) for one in mappings]]
    bodies = set()
    for variant in variants:
        with encoded([*variant, b"{broken"], lane_operations=10) as one:
            bodies.add(one.body.read())
    assert len(bodies) == 1


def test_the_same_content_again_is_not_new() -> None:
    """Putting the same content again keeps the object and returns its reference, even if the lanes would now differ."""
    payloads, objects = store()
    first, new = put(payloads, upserts(50), lane_operations=10)
    assert new
    before = dict(objects.stored)
    for lane_operations in (10, 1_000):
        assert put(payloads, upserts(50), lane_operations=lane_operations) == (first, False)
    assert objects.stored == before


BROKEN = b'{"op":"drop","entity":"e","key":"k"}'


@pytest.mark.parametrize(
    "other",
    [
        [],
        [upsert("a"), upsert("b", n=2)],
        [upsert("b"), upsert("a")],
        [upsert("a"), upsert("b"), BROKEN],
        [upsert("a"), BROKEN, upsert("b")],
        [upsert("a", group="g"), upsert("b")],
    ],
)
def test_other_content_under_the_same_id_is_a_conflict(other: list[OperationInput]) -> None:
    """Other data, another order, another group or one more refused operation is other content."""
    payloads, _ = store()
    put(payloads, [upsert("a"), upsert("b")])
    with pytest.raises(RequestConflict) as caught:
        put(payloads, other)
    assert caught.value.request_id == "r1"


def test_other_refused_operations_are_a_conflict() -> None:
    """Refused operations are part of the content too."""
    payloads, _ = store()
    put(payloads, [BROKEN])
    assert put(payloads, [BROKEN])[1] is False
    with pytest.raises(RequestConflict):
        put(payloads, [BROKEN.replace(b"drop", b"sink")])


def test_another_source_under_the_same_id_is_a_conflict() -> None:
    """A source cannot take over another source's request id, not even with the same content."""
    payloads, _ = store()
    put(payloads, upserts(2), source="shop")
    with pytest.raises(RequestConflict):
        put(payloads, upserts(2), source="warehouse")


def test_a_missing_payload_is_not_found() -> None:
    """`find` raises `NotFound`. A message that names a missing payload raises `IntegrityError`."""
    payloads, _ = store()
    with pytest.raises(NotFound):
        payloads.find("r1")
    with pytest.raises(IntegrityError):
        payloads.header(Reference(v=1, request_id="r1", payload="payloads/r1", digest="", lanes=0, source="shop"))


def test_an_empty_request_has_no_lanes() -> None:
    """It is stored as a payload with neither lanes nor refusals."""
    payloads, _ = store()
    reference, _ = put(payloads, [])
    assert reference.lanes == 0
    assert payloads.refused(reference) == []
    assert payloads.header(reference).operations == 0


# -- damage


def everything(payloads: Payloads, reference: Reference) -> tuple[Header, list[Indexed], list[Refusal]]:
    return payloads.header(reference), read_all(payloads, reference), payloads.refused(reference)


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_byte_is_detected(data: st.DataObject) -> None:
    """Whichever byte of the object is changed, reading raises `IntegrityError`, and wrong data is never returned."""
    payloads, objects = store()
    reference, _ = put(payloads, [*upserts(10), BROKEN], lane_operations=5)
    good = everything(payloads, reference)
    body = bytearray(objects.stored["payloads/r1"])
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] ^= data.draw(st.integers(1, 255))
    objects.stored["payloads/r1"] = bytes(body)
    fresh = Payloads(objects=objects, prefix="payloads/", max_lane_bytes=MAX_LANE)
    with pytest.raises(IntegrityError):
        everything(fresh, reference)
    assert everything(payloads, reference) == good  # `payloads` still has the bytes of its first read


@pytest.mark.parametrize("kept", [0, 3, 7, 8, 100, -1])
def test_a_truncated_object_is_detected(kept: int) -> None:
    """An object that ends early is not read as a smaller payload."""
    payloads, objects = store()
    reference, _ = put(payloads, [*upserts(10), BROKEN])
    objects.stored["payloads/r1"] = objects.stored["payloads/r1"][:kept]
    with pytest.raises(IntegrityError):
        everything(payloads, reference)


def forge(objects: MemoryObjects, text: bytes, *, stored: bytes | None = None, **changes: Any) -> Reference:
    """Store a payload whose digests are right but whose only lane may lie; `changes` replace fields of the lane's section."""
    body = zstandard.ZstdCompressor().compress(text) if stored is None else stored
    fields = {"raw": len(text), "count": text.count(b"\n"), "length": len(body), "offset": 0, **changes}
    section = Section(digest=hashlib.sha256(body).hexdigest(), **fields)
    nothing = zstandard.ZstdCompressor().compress(b"")
    refused = Section(offset=len(body), length=len(nothing), raw=0, count=0, digest=hashlib.sha256(nothing).hexdigest())
    header = Header(
        v=1,
        codec="zstd",
        request_id="r1",
        source="shop",
        content="",
        created_at=0,
        operations=section.count,
        lanes=(section,),
        refused=refused,
        refused_counts={},
    )
    head = exactjson.dumps(header)
    objects.stored["payloads/r1"] = MAGIC + len(head).to_bytes(4, "big") + head + body + nothing
    digest = hashlib.sha256(head).hexdigest()
    return Reference(v=1, request_id="r1", payload="payloads/r1", digest=digest, lanes=1, source="shop")


LINE = b'{"index":0,"op":"delete","entity":"e","key":"k"}\n'


def test_a_forged_payload_that_does_not_lie_is_read() -> None:
    """Each forgery below differs from this payload only in its lie."""
    payloads, objects = store()
    assert len(payloads.lane(forge(objects, LINE * 2), 0)) == 2


LIES = {
    "larger than a lane may be": (LINE * (MAX_LANE // len(LINE) + 1), {}),
    "claims more bytes": (LINE, {"raw": len(LINE) + 1}),
    "claims fewer bytes": (LINE, {"raw": len(LINE) - 1}),
    "claims more lines": (LINE, {"count": 2}),
    "claims fewer lines": (LINE * 2, {"count": 1}),
    "not compressed": (LINE, {"stored": LINE}),
    "begins elsewhere": (LINE, {"offset": 1}),
    "without newline": (LINE[:-1], {"count": 1}),
    "not JSON": (b'{"index":0,"op":"dele\n', {}),
    "no index": (LINE.replace(b'"index":0,', b""), {}),
    "unknown op": (LINE.replace(b"delete", b"drop"), {}),
    "unknown field": (LINE.replace(b"}", b',"x":1}'), {}),
    "deep": (
        b'{"index":0,"op":"insert","entity":"e","key":"k","data":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001 + b"\n",
        {},
    ),
    "two on a line": (LINE[:-1] * 2 + b"\n", {}),
    "half an attribute": (LINE.replace(b"}", b',"attribute":{"M":}'), {}),
}


@pytest.mark.parametrize(("text", "changes"), LIES.values(), ids=LIES.keys())
def test_a_forged_lane_is_detected(text: bytes, changes: Mapping[str, Any]) -> None:
    """A lane that differs from what its header says, or cannot be decoded, is never executed."""
    payloads, objects = store()
    reference = forge(objects, text, **changes)
    with pytest.raises(IntegrityError):
        payloads.lane(reference, 0)


def test_a_lane_that_claims_too_many_bytes_is_not_read() -> None:
    """No read is longer than the lane's content can take, whatever length the header claims."""
    payloads, objects = store()
    reference = forge(objects, LINE, length=2_000)
    with pytest.raises(IntegrityError, match="claims more bytes than its 49 can take"):
        payloads.lane(reference, 0)
    assert len(objects.gets) == 1


@pytest.mark.parametrize("says_its_size", [True, False])
def test_a_zip_bomb_is_detected_in_little_memory(says_its_size: bool) -> None:
    """A lane of a few bytes that expands to 64 MiB is refused before it is expanded, whatever size its frame claims."""
    payloads, objects = store()
    bomb = zstandard.ZstdCompressor(write_content_size=says_its_size).compress(b"\n" * 2**26)
    reference = forge(objects, LINE, stored=bomb)
    payloads.header(reference)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            payloads.lane(reference, 0)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_frame_that_claims_more_than_the_memory_is_detected() -> None:
    """A frame that claims a tebibyte is refused like any other, without running out of memory."""
    payloads, objects = store()
    frame = zstandard.ZstdCompressor().compress(b"x" * 2**20)
    # The four bytes after magic number and descriptor hold the size of the content.
    size_at = frame.index((2**20).to_bytes(4, "little"))
    lying_frame = (
        frame[:4] + bytes([frame[4] | 0xC0]) + frame[5:size_at] + (2**40).to_bytes(8, "little") + frame[size_at + 4 :]
    )
    assert zstandard.frame_content_size(lying_frame) == 2**40
    with pytest.raises(IntegrityError):
        payloads.lane(forge(objects, LINE, stored=lying_frame), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": "elsewhere/r1"},
        {"payload": "payloads/r2"},
        {"payload": "payloads/../payloads/r1"},
        {"payload": ""},
        {"request_id": "r2"},
        {"request_id": "r2", "payload": "payloads/r2"},
        {"digest": "0" * 64},
        {"digest": ""},
        {"v": 0},
        {"v": 1},
        {"v": 3},
        {"v": -1},
        {"lanes": 2},
        {"lanes": 0},
    ],
    ids=str,
)
def test_a_forged_reference_is_detected(changes: Mapping[str, Any]) -> None:
    """A message may only name the payload of its own request, with the right key, digest, version and number of lanes."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(3))
    objects.stored["payloads/r2"] = objects.stored["elsewhere/r1"] = objects.stored["payloads/r1"]
    lie = msgspec.structs.replace(reference, **changes)
    with pytest.raises(IntegrityError):
        payloads.lane(lie, 0)
    with pytest.raises(IntegrityError):
        payloads.header(lie)


@pytest.mark.parametrize("changes", [{"payload": "elsewhere/r1"}, {"request_id": "r2"}, {"v": 3}], ids=str)
def test_a_reference_with_a_wrong_place_or_version_causes_no_read(changes: Mapping[str, Any]) -> None:
    """Key, request id and version are checked before the first read."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(3))
    with pytest.raises(IntegrityError):
        payloads.confine(msgspec.structs.replace(reference, **changes))
    with pytest.raises(IntegrityError):
        payloads.header(msgspec.structs.replace(reference, **changes))
    assert objects.gets == []


@pytest.mark.parametrize("number", [-1, 1, 99])
def test_a_missing_lane_is_detected(number: int) -> None:
    """A message cannot make a worker read past the lanes."""
    payloads, _ = store()
    reference, _ = put(payloads, upserts(3))
    with pytest.raises(IntegrityError):
        payloads.lane(reference, number)


# -- operations that are refused before anything is sent


def test_an_invalid_operation_is_refused_with_its_reason() -> None:
    """The refused section has its index, reason, detail and readable fields; the other operations are in lanes."""
    payloads, _ = store()
    sources: list[OperationInput] = [
        upsert("a"),
        {"op": "insert", "entity": "e", "key": "b"},
        b"{broken",
        {"op": "upsert", "entity": "e", "key": "c", "data": {"x": "y" * MAX_LANE}},
        upsert("d"),
    ]
    with built([]) as builder:
        answers = [builder.add(source) for source in sources]
        one = builder.encode("r1", "shop")
        with one.body:
            reference, *_ = payloads.put(one)
    refused = payloads.refused(reference)
    assert [found for found in answers if found] == refused
    assert [found is None for found in answers] == [True, False, False, False, True]
    assert refused[0] == Refusal(
        index=1, reason=Reason.INVALID, detail="data: insert needs a JSON object", op="insert", entity="e", key="b"
    )
    assert (refused[1].index, refused[1].reason, refused[1].op, refused[1].key) == (2, Reason.INVALID, "", "")
    assert refused[1].detail.startswith("line: not a JSON object of an operation: ")
    assert (refused[2].index, refused[2].reason, refused[2].key) == (3, Reason.TOO_LARGE, "c")
    assert [item.index for item in read_all(payloads, reference)] == [0, 4]
    header = payloads.header(reference)
    assert header.operations == 5
    assert header.refused_counts == {"invalid": 2, "too_large": 1}


def nested(levels: int) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for _ in range(levels):
        data = {"a": data}
    return data


HOSTILE: dict[str, OperationInput] = {
    "deep mapping": {"op": "upsert", "entity": "e", "key": "k", "data": nested(100_000)},
    "5,000 digits": {"op": "upsert", "entity": "e", "key": "k", "data": {"a": 10**5_000}},
    "half a pair as a name": {"op": "upsert", "entity": "e", "key": "k", "\ud800": 1},
    "half a pair in data": {"op": "upsert", "entity": "e", "key": "k", "data": {"a": "\ud800"}},
    "half a pair in a key": {"op": "upsert", "entity": "e", "key": "\ud800", "data": {}},
    "half a pair in a group": {"op": "upsert", "entity": "e", "key": "k", "data": {}, "group": "\ud800"},
    "huge exponent": b'{"op":"upsert","entity":"e","key":"k","data":{"a":1e99999999999999999999}}',
    "deep line": b'{"op":"upsert","entity":"e","key":"k","data":' + b'{"a":' * 100_000,
    "not UTF-8": b"\xff\xfe",
    "unknown op": Operation(op="drop", entity="e", key="k"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_operation_never_blocks_the_others(hostile: OperationInput) -> None:
    """Any invalid operation is refused alone, and the rest of its request is accepted."""
    payloads, _ = store()
    reference, _ = put(payloads, [upsert("a"), hostile, upsert("b")])
    assert [item.index for item in read_all(payloads, reference)] == [0, 2]
    assert [(found.index, found.reason) for found in payloads.refused(reference)] == [(1, Reason.INVALID)]


def refused_of(sources: Iterable[OperationInput]) -> tuple[list[int], list[Refusal]]:
    """Return the indexes of the operations that went into lanes, and the refusals by index."""
    payloads, _ = store()
    reference, _ = put(payloads, sources)
    header = payloads.header(reference)
    refused = sorted(payloads.refused(reference), key=lambda one: one.index)
    assert sum(header.refused_counts.values()) == len(refused)
    return [item.index for item in read_all(payloads, reference)], refused


def test_a_group_of_99_is_accepted() -> None:
    """A transaction has 100 actions: 99 operations and the receipt."""
    accepted, refused = refused_of(upsert(f"k{number}", "g") for number in range(99))
    assert (accepted, refused) == (list(range(99)), [])


def test_a_group_of_100_is_refused_with_the_reason_on_each() -> None:
    """Each operation of a group that is too large is refused, and the rest of the request is accepted."""
    accepted, refused = refused_of(
        [*(upsert(f"k{number}", "g") for number in range(100)), upsert("z", "h"), upsert("y")]
    )
    assert accepted == [100, 101]
    assert [(one.index, one.reason, one.key) for one in refused] == [
        (number, Reason.INVALID, f"k{number}") for number in range(100)
    ]
    assert {one.detail for one in refused} == {"group: more than 99 operations cannot apply atomically"}


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_invalid_member_refuses_its_group(position: int) -> None:
    """At any position, an invalid operation takes its group with it, and no other."""
    sources: list[OperationInput] = [upsert("a", "g"), upsert("b", "g"), upsert("c", "h")]
    sources.insert(position, {"op": "insert", "entity": "e", "key": "x", "group": "g"})
    accepted, refused = refused_of(sources)
    assert accepted == [3]
    by_index = {one.index: (one.reason, one.detail) for one in refused}
    assert by_index.pop(position) == (Reason.INVALID, "data: insert needs a JSON object")
    assert list(by_index.values()) == [(Reason.GROUP_REFUSED, "another operation of the group is invalid")] * 2


MEMBERS = {
    "unknown field": b'{"op":"upsert","entity":"e","key":"x","data":{},"group":"g","colour":1}',
    "wrong type": b'{"op":"upsert","entity":"e","key":5,"data":{},"group":"g"}',
    "5,000 digits": b'{"op":"upsert","entity":"e","key":"x","data":{"a":' + b"7" * 5_000 + b'},"group":"g"}',
    "huge exponent": b'{"op":"upsert","entity":"e","key":"x","data":{"a":1e99999999999999999999},"group":"g"}',
}


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS.keys())
def test_a_member_that_cannot_be_decoded_refuses_its_group(member: bytes) -> None:
    """Well-formed JSON names its group, even if a value in it is invalid, so the whole group is refused."""
    accepted, refused = refused_of([upsert("a", "g"), member, upsert("c")])
    assert accepted == [2]
    assert [one.reason for one in refused] == [Reason.GROUP_REFUSED, Reason.INVALID]


def test_two_operations_of_a_group_on_one_key_are_invalid() -> None:
    """`TransactWriteItems` accepts an item once. The same key of another entity is another item."""
    accepted, refused = refused_of([upsert("a", "g"), upsert("b", "g"), upsert("a", "g")])
    assert accepted == []
    assert {(one.reason, one.detail) for one in refused} == {
        (Reason.INVALID, "group: two of its operations are on key 'a'")
    }
    other = Operation(op="upsert", entity="f", key="a", data={}, group="g")
    assert refused_of([upsert("a", "g"), other]) == ([0, 1], [])


def test_a_request_with_too_many_refusals_is_refused() -> None:
    """All refusals must be readable later; a request with more refusals than that allows is refused before it is stored."""
    payloads, _ = store()
    with pytest.raises(PayloadTooLarge, match="is this a file of operations"):
        put(payloads, [b"{broken"] * 12_000)
    reference, _ = put(payloads, [b"{broken"] * 5_000)
    assert [one.index for one in payloads.refused(reference)] == list(range(5_000))


# -- limits


def large(key: str, size: int, group: str | None = None) -> Operation:
    return upsert(key, group, x="y" * size)


@pytest.fixture
def spill_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[IO[bytes]]]:
    """Record the temporary files that payload builders open."""
    opened: list[IO[bytes]] = []
    open_file = sections.spill_file

    def recorded() -> IO[bytes]:
        opened.append(open_file())
        return opened[-1]

    for module in (sections, payload_builder_module):
        monkeypatch.setattr(module, "spill_file", recorded)
    yield opened
    for one in opened:
        one.close()


@pytest.mark.usefixtures("spill_files")
@pytest.mark.parametrize("keys", [["k"] * 4, ["a", "b", "c", "d"]], ids=["one key", "one group"])
def test_a_lane_that_would_be_too_large_is_refused(keys: list[str]) -> None:
    """Operations that must share a lane and exceed its limit are refused before anything is stored."""
    group = "g" if keys[0] != keys[1] else None
    sources = [large(key, 300_000, group) for key in keys]
    with pytest.raises(PayloadTooLarge) as caught, encoded(sources, lane_bytes=2**16):
        pass
    assert caught.value.field == "operations"
    assert caught.value.expected.startswith(f"at most {MAX_LANE} bytes that share a key or a group")


def test_temporary_files_are_always_closed(spill_files: list[IO[bytes]]) -> None:
    """A payload builder closes the files that it opened, even if the payload is refused."""
    with encoded(upserts(3)):
        pass
    assert [one.closed for one in spill_files] == [True] * len(spill_files)
    with pytest.raises(PayloadTooLarge), encoded([large("k", 300_000)] * 4, lane_bytes=2**16):
        pass
    assert [one.closed for one in spill_files] == [True] * len(spill_files)


@pytest.mark.usefixtures("spill_files")
def keys_that_share_a_lane(count: int, sharing: int) -> list[str]:
    """Return `count` keys of which at least `sharing` fall into one lane, although there are `count` lanes."""
    for attempt in range(10_000):
        keys = [f"k{attempt}-{number}" for number in range(count)]
        partition = Partition()
        for key in keys:
            partition.add(upsert(key), 1)
        if max(map(len, partition.lanes(operations=1, size=count))) >= sharing:
            return keys
    raise AssertionError("no such keys")


def test_the_number_of_operations_that_must_share_a_lane_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations over a lane's limit are refused if they share a key. A forged lane over the limit is not read."""
    for module in (payload_builder_module, payload_module):
        monkeypatch.setattr(module, "MAX_LANE_OPERATIONS", 10)
    payloads, objects = store()
    reference, _ = put(payloads, [upsert("k") for _ in range(10)])
    assert len(payloads.lane(reference, 0)) == 10
    with pytest.raises(PayloadTooLarge) as caught, encoded([upsert("k") for _ in range(11)]):
        pass
    assert caught.value.expected == "at most 10 operations that share a key or a group: send several requests"
    with pytest.raises(IntegrityError, match="claims 11 operations"):
        payloads.lane(forge(objects, LINE * 11), 0)


@pytest.mark.usefixtures("spill_files")
def test_operations_that_share_no_key_never_exceed_a_lane() -> None:
    """Large operations on distinct keys get enough lanes, wherever their hashes fall."""
    payloads, _ = store()
    sources = [large(key, 239_000) for key in keys_that_share_a_lane(10, 5)]
    reference, _ = put(payloads, sources, lane_bytes=240_000)
    assert len(read_all(payloads, reference)) == 10


def test_the_number_of_operations_of_a_request_is_limited() -> None:
    """Invalid operations count too; exactly the limit is allowed."""
    with built([upsert("a"), b"{broken", upsert("b")], max_request_operations=3) as builder:
        with pytest.raises(PayloadTooLarge) as caught:
            builder.add(upsert("c"))
        assert (caught.value.value, caught.value.expected) == (4, "at most 3")


def test_a_request_over_4_mb_is_spilled_to_disk_and_read_back() -> None:
    """A request larger than the builder's memory is encoded like any other."""
    payloads, _ = store()
    sources = [large(f"k{number}", 100_000) for number in range(60)]
    reference, _ = put(payloads, sources, lane_bytes=2**18)
    assert [operation_of(one) for one in read_all(payloads, reference)] == sources


# -- record data in blobs


def test_data_in_a_blob_is_read_back() -> None:
    """A blob is compressed JSON under the digest of its content, and the same content is stored once."""
    objects = MemoryObjects()
    blobs = Blobs(objects=objects, prefix="blobs/", max_bytes=2**20)
    data = {"a": ["e\u0301", 10**37, None, ""]}
    pointer = blobs.put(exactjson.dumps(data))
    assert blobs.put(exactjson.dumps(data)) == pointer
    assert list(objects.stored) == [pointer.key]
    assert pointer.key.startswith("blobs/")
    assert pointer.size == len(exactjson.dumps(data))
    assert blobs.get(pointer) == data


def test_a_blob_of_another_compressor_is_read() -> None:
    """The digest is of the content, not of its compressed form, so a blob of another compressor's version is still valid."""
    objects = MemoryObjects()
    blobs = Blobs(objects=objects, prefix="blobs/", max_bytes=2**20)
    data = {"a": list(range(2_000))}
    key = blobs.put(exactjson.dumps(data)).key
    objects.stored[key] = zstandard.ZstdCompressor(level=-50).compress(exactjson.dumps(data))
    assert blobs.get(blobs.put(exactjson.dumps(data))) == data


@pytest.mark.parametrize(
    "changes",
    [{"key": "payloads/r1"}, {"size": 2**20 + 1}, {"size": 5}, {"digest": "0" * 64}, {"key": "blobs/x"}],
    ids=str,
)
def test_a_forged_pointer_is_detected(changes: Mapping[str, Any]) -> None:
    """A pointer outside the prefix or the bounds, or to other bytes than it says, is not followed."""
    objects = MemoryObjects()
    blobs = Blobs(objects=objects, prefix="blobs/", max_bytes=2**20)
    pointer = blobs.put(exactjson.dumps({"a": "x" * 1_000}))
    objects.stored["payloads/r1"] = objects.stored[pointer.key]
    with pytest.raises(IntegrityError):
        blobs.get(msgspec.structs.replace(pointer, **changes))
