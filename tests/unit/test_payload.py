"""Payloads: from operations to one object and back, and every way in which that object can lie."""

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
def drafted(sources: Iterable[OperationInput], **changes: Any) -> Iterator[PayloadBuilder]:
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
    with drafted(sources, **changes) as builder:
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
        return payloads.put(one)


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
def test_operations_come_back_as_given(given_operations: list[Operation], lane_operations: int) -> None:
    """Each operation comes back once, exact, with its index, and the lanes keep the order of the request."""
    payloads, _ = store()
    reference, new = put(payloads, given_operations, lane_operations=lane_operations)
    assert new
    for lane in range(reference.lanes):
        indexes = [one.index for one in payloads.lane(reference, lane)]
        assert indexes
        assert indexes == sorted(indexes)
    found = read_all(payloads, reference)
    assert [(one.index, operation_of(one)) for one in found] == list(enumerate(given_operations))
    assert not any(one.data for one in found)  # all of it small enough to be sent as it stands
    assert payloads.header(reference).operations == len(given_operations)


def test_a_small_payload_is_one_get() -> None:
    """Header, lane and refusals of a small request come with one ranged read."""
    payloads, objects = store()
    reference, _ = put(payloads, [*upserts(20), {"op": "drop"}], lane_operations=1_000)
    assert len(payloads.lane(reference, 0)) == 20
    assert len(payloads.refused(reference)) == 1
    assert [key for key, _, _ in objects.gets] == ["payloads/r1"]


def test_a_header_over_the_first_read_works() -> None:
    """A header of more than 64 KiB takes two reads, once, and each lane then one of its own."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(1_500), lane_operations=1)
    assert len(exactjson.dumps(payloads.header(reference))) > 2**16
    assert len(objects.gets) == 2
    payloads.lane(reference, 0)
    payloads.lane(reference, reference.lanes - 1)
    assert len(objects.gets) == 4
    assert [operation_of(one) for one in read_all(payloads, reference)] == upserts(1_500)


def test_a_worker_reads_only_its_own_lane() -> None:
    """The ranged read of a lane has that lane's bytes and no others."""
    payloads, objects = store()
    noise = [upsert(f"k{number}", x=hashlib.sha512(b"%d" % number).hexdigest() * 20) for number in range(2_000)]
    reference, _ = put(payloads, noise, lane_operations=250)
    section = payloads.header(reference).lanes[3]
    del objects.gets[:]
    payloads.lane(reference, 3)
    ((_, start, end),) = objects.gets
    assert end - start == section.length < len(objects.stored["payloads/r1"]) / 4


def test_the_reference_says_where_and_what() -> None:
    """A reference has version, place, digest of the header, number of lanes and source."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(3))
    body = objects.stored["payloads/r1"]
    length = int.from_bytes(body[4:8], "big")
    assert reference == Reference(
        v=1,
        request_id="r1",
        payload="payloads/r1",
        digest=hashlib.sha256(body[8 : 8 + length]).hexdigest(),
        lanes=1,
        source="shop",
    )
    assert payloads.find("r1") == reference


def test_the_bytes_are_deterministic() -> None:
    """The same operations, however they are given, are encoded to the same bytes."""
    words = [msgspec.to_builtins(one) for one in upserts(50)]
    variants: list[Sequence[OperationInput]] = [upserts(50), words, [exactjson.dumps(word) for word in words]]
    bodies = set()
    for variant in variants:
        with encoded([*variant, b"{broken"], lane_operations=10) as one:
            bodies.add(one.body.read())
    assert len(bodies) == 1


def test_the_same_content_again_is_not_new() -> None:
    """A second put of the same content leaves the object and returns the same reference, even where lanes are cut anew."""
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
    """Other data, another order, another group or one more refused operation are other content."""
    payloads, _ = store()
    put(payloads, [upsert("a"), upsert("b")])
    with pytest.raises(RequestConflict) as caught:
        put(payloads, other)
    assert caught.value.request_id == "r1"


def test_other_broken_content_is_a_conflict() -> None:
    """Operations that are refused are content too."""
    payloads, _ = store()
    put(payloads, [BROKEN])
    assert put(payloads, [BROKEN])[1] is False
    with pytest.raises(RequestConflict):
        put(payloads, [BROKEN.replace(b"drop", b"sink")])


def test_another_source_under_the_same_id_is_a_conflict() -> None:
    """A source cannot take over another one's request id, not even with the same content."""
    payloads, _ = store()
    put(payloads, upserts(2), source="shop")
    with pytest.raises(RequestConflict):
        put(payloads, upserts(2), source="warehouse")


def test_what_is_not_stored_is_not_found() -> None:
    """`find` says so; a message that names a payload which is not there is not to be trusted."""
    payloads, _ = store()
    with pytest.raises(NotFound):
        payloads.find("r1")
    with pytest.raises(IntegrityError):
        payloads.header(Reference(v=1, request_id="r1", payload="payloads/r1", digest="", lanes=0, source="shop"))


def test_an_empty_request_has_no_lanes() -> None:
    """Nothing is stored as a payload without lanes and refusals."""
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
def test_a_damaged_byte_is_untrusted(data: st.DataObject) -> None:
    """Whichever byte of the object is changed, something is found to be untrusted, and nothing is read wrong."""
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
    assert everything(payloads, reference) == good  # what has been read stays as it was


@pytest.mark.parametrize("kept", [0, 3, 7, 8, 100, -1])
def test_a_cut_object_is_untrusted(kept: int) -> None:
    """An object that ends too early is not read as a smaller one."""
    payloads, objects = store()
    reference, _ = put(payloads, [*upserts(10), BROKEN])
    objects.stored["payloads/r1"] = objects.stored["payloads/r1"][:kept]
    with pytest.raises(IntegrityError):
        everything(payloads, reference)


def forge(objects: MemoryObjects, text: bytes, *, stored: bytes | None = None, **changes: Any) -> Reference:
    """Store a payload whose digests all fit but whose only lane may lie; changes are to its section."""
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
    """The forgeries below differ from this one only by their lie."""
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
    "no JSON": (b'{"index":0,"op":"dele\n', {}),
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
def test_a_lane_that_lies_is_untrusted(text: bytes, changes: Mapping[str, Any]) -> None:
    """A lane that is not what its header says, or cannot be decoded, is never executed."""
    payloads, objects = store()
    reference = forge(objects, text, **changes)
    with pytest.raises(IntegrityError):
        payloads.lane(reference, 0)


def test_a_lane_is_not_read_that_is_longer_than_what_it_holds() -> None:
    """However long it says it is, no more than its lines can take is asked for."""
    payloads, objects = store()
    reference = forge(objects, LINE, length=2_000)
    with pytest.raises(IntegrityError, match="claims more bytes than its 49 can take"):
        payloads.lane(reference, 0)
    assert len(objects.gets) == 1


@pytest.mark.parametrize("says_its_size", [True, False])
def test_a_zip_bomb_is_untrusted_and_takes_no_memory(says_its_size: bool) -> None:
    """A lane of a few bytes that would become 64 MiB is refused before it is that large, whatever its frame says."""
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


def test_a_frame_that_claims_more_than_there_is_memory_is_untrusted() -> None:
    """A frame that claims a tebibyte is refused like any other, and not by running out of memory."""
    payloads, objects = store()
    frame = zstandard.ZstdCompressor().compress(
        b"x" * 2**20
    )  # its size takes the four bytes after magic and descriptor
    size_at = frame.index((2**20).to_bytes(4, "little"))
    claim_checks = (
        frame[:4] + bytes([frame[4] | 0xC0]) + frame[5:size_at] + (2**40).to_bytes(8, "little") + frame[size_at + 4 :]
    )
    assert zstandard.frame_content_size(claim_checks) == 2**40
    with pytest.raises(IntegrityError):
        payloads.lane(forge(objects, LINE, stored=claim_checks), 0)


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
        {"v": 2},
        {"v": -1},
        {"lanes": 2},
        {"lanes": 0},
    ],
    ids=str,
)
def test_a_reference_that_lies_is_untrusted(changes: Mapping[str, Any]) -> None:
    """A message may name the payload of its own request only, in its place, with its digest, version and lanes."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(3))
    objects.stored["payloads/r2"] = objects.stored["elsewhere/r1"] = objects.stored["payloads/r1"]
    lie = msgspec.structs.replace(reference, **changes)
    with pytest.raises(IntegrityError):
        payloads.lane(lie, 0)
    with pytest.raises(IntegrityError):
        payloads.header(lie)


@pytest.mark.parametrize("changes", [{"payload": "elsewhere/r1"}, {"request_id": "r2"}, {"v": 2}], ids=str)
def test_what_is_out_of_place_is_not_even_read(changes: Mapping[str, Any]) -> None:
    """Place and version are checked before the first read."""
    payloads, objects = store()
    reference, _ = put(payloads, upserts(3))
    with pytest.raises(IntegrityError):
        payloads.confine(msgspec.structs.replace(reference, **changes))
    with pytest.raises(IntegrityError):
        payloads.header(msgspec.structs.replace(reference, **changes))
    assert objects.gets == []


@pytest.mark.parametrize("number", [-1, 1, 99])
def test_a_lane_that_is_not_there_is_untrusted(number: int) -> None:
    """A message cannot make a worker read past the lanes."""
    payloads, _ = store()
    reference, _ = put(payloads, upserts(3))
    with pytest.raises(IntegrityError):
        payloads.lane(reference, number)


# -- what is refused before anything is sent


def test_an_invalid_operation_is_refused_with_its_words() -> None:
    """Index, reason, detail and what can be read of the operation are in the refused section; the others are in lanes."""
    payloads, _ = store()
    sources: list[OperationInput] = [
        upsert("a"),
        {"op": "insert", "entity": "e", "key": "b"},
        b"{broken",
        {"op": "upsert", "entity": "e", "key": "c", "data": {"x": "y" * MAX_LANE}},
        upsert("d"),
    ]
    with drafted([]) as builder:
        answers = [builder.add(source) for source in sources]
        one = builder.encode("r1", "shop")
        with one.body:
            reference, _ = payloads.put(one)
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
    """Whatever is handed over as an operation, it is refused alone, and the rest of its request goes on."""
    payloads, _ = store()
    reference, _ = put(payloads, [upsert("a"), hostile, upsert("b")])
    assert [item.index for item in read_all(payloads, reference)] == [0, 2]
    assert [(found.index, found.reason) for found in payloads.refused(reference)] == [(1, Reason.INVALID)]


def refused_of(sources: Iterable[OperationInput]) -> tuple[list[int], list[Refusal]]:
    """Indexes that went into lanes, and the refusals by index."""
    payloads, _ = store()
    reference, _ = put(payloads, sources)
    header = payloads.header(reference)
    refused = sorted(payloads.refused(reference), key=lambda one: one.index)
    assert sum(header.refused_counts.values()) == len(refused)
    return [item.index for item in read_all(payloads, reference)], refused


def test_a_group_of_99_is_accepted() -> None:
    """A transaction's hundred actions are 99 and the receipt."""
    accepted, refused = refused_of(upsert(f"k{number}", "g") for number in range(99))
    assert (accepted, refused) == (list(range(99)), [])


def test_a_group_of_100_is_refused_with_the_reason_on_each() -> None:
    """None of a group that is too large is sent, and the rest of the request is."""
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
    """Wherever it stands, an invalid operation takes its group with it, and only its group."""
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
    """All of a group or none: well-formed JSON names its group, even where a value in it cannot be taken."""
    accepted, refused = refused_of([upsert("a", "g"), member, upsert("c")])
    assert accepted == [2]
    assert [one.reason for one in refused] == [Reason.GROUP_REFUSED, Reason.INVALID]


def test_two_operations_of_a_group_on_one_key_are_invalid() -> None:
    """`TransactWriteItems` takes an item once; the same key of another entity is another item."""
    accepted, refused = refused_of([upsert("a", "g"), upsert("b", "g"), upsert("a", "g")])
    assert accepted == []
    assert {(one.reason, one.detail) for one in refused} == {
        (Reason.INVALID, "group: two of its operations are on key 'a'")
    }
    other = Operation(op="upsert", entity="f", key="a", data={}, group="g")
    assert refused_of([upsert("a", "g"), other]) == ([0, 1], [])


def test_more_refusals_than_can_be_looked_up_are_not_accepted() -> None:
    """Nothing vanishes: a request whose refusals would be too many to be read back is refused before it is stored."""
    payloads, _ = store()
    with pytest.raises(PayloadTooLarge, match="is this a file of operations"):
        put(payloads, [b"{broken"] * 12_000)
    reference, _ = put(payloads, [b"{broken"] * 5_000)
    assert [one.index for one in payloads.refused(reference)] == list(range(5_000))


# -- limits


def large(key: str, size: int, group: str | None = None) -> Operation:
    return upsert(key, group, x="y" * size)


@pytest.fixture
def spools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[IO[bytes]]]:
    """The temporary files that drafts open."""
    opened: list[IO[bytes]] = []
    spool = payload_builder_module._spill_file

    def recorded() -> IO[bytes]:
        opened.append(spool())
        return opened[-1]

    monkeypatch.setattr(payload_builder_module, "_spill_file", recorded)
    yield opened
    for one in opened:
        one.close()


@pytest.mark.usefixtures("spools")
@pytest.mark.parametrize("keys", [["k"] * 4, ["a", "b", "c", "d"]], ids=["one key", "one group"])
def test_a_lane_that_would_be_too_large_is_refused(keys: list[str]) -> None:
    """Operations that must share a lane and exceed its limit are refused before anything is stored."""
    group = "g" if keys[0] != keys[1] else None
    sources = [large(key, 300_000, group) for key in keys]
    with pytest.raises(PayloadTooLarge) as caught, encoded(sources, lane_bytes=2**16):
        pass
    assert caught.value.field == "operations"
    assert caught.value.expected.startswith(f"at most {MAX_LANE} bytes that share a key or a group")


def test_temporary_files_are_closed_whatever_happens(spools: list[IO[bytes]]) -> None:
    """A draft closes what it opened, also where the payload is refused."""
    with encoded(upserts(3)):
        pass
    assert [one.closed for one in spools] == [True] * len(spools)
    with pytest.raises(PayloadTooLarge), encoded([large("k", 300_000)] * 4, lane_bytes=2**16):
        pass
    assert [one.closed for one in spools] == [True] * len(spools)


@pytest.mark.usefixtures("spools")
def crowded(count: int, crowd: int) -> list[str]:
    """Keys for as many lanes of which `crowd` fall into one lane."""
    for attempt in range(10_000):
        keys = [f"k{attempt}-{number}" for number in range(count)]
        partition = Partition()
        for key in keys:
            partition.add(upsert(key), 1)
        if max(map(len, partition.lanes(operations=1, size=count))) >= crowd:
            return keys
    raise AssertionError("no such keys")


def test_a_key_has_so_many_operations_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """More small operations than a lane may have are refused where they share a key, and dealt where they do not."""
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


@pytest.mark.usefixtures("spools")
def test_operations_that_share_nothing_are_never_too_large() -> None:
    """Large operations on distinct keys get lanes enough, however their hashes fall."""
    payloads, _ = store()
    sources = [large(key, 239_000) for key in crowded(10, 5)]
    reference, _ = put(payloads, sources, lane_bytes=240_000)
    assert len(read_all(payloads, reference)) == 10


def test_a_request_holds_so_many_operations_and_no_more() -> None:
    """The limit counts all operations, the invalid ones included; the limit itself is allowed."""
    with drafted([upsert("a"), b"{broken", upsert("b")], max_request_operations=3) as builder:
        with pytest.raises(PayloadTooLarge) as caught:
            builder.add(upsert("c"))
        assert (caught.value.value, caught.value.expected) == (4, "at most 3")


def test_what_is_over_4_mb_is_spooled_and_comes_back() -> None:
    """A request larger than the memory of its draft is encoded like any other."""
    payloads, _ = store()
    sources = [large(f"k{number}", 100_000) for number in range(60)]
    reference, _ = put(payloads, sources, lane_bytes=2**18)
    assert [operation_of(one) for one in read_all(payloads, reference)] == sources


# -- record data kept apart


def test_data_kept_apart_comes_back() -> None:
    """A blob is its JSON, compressed, under the digest of its content; the same content is stored once."""
    objects = MemoryObjects()
    blobs = Blobs(objects=objects, prefix="blobs/", max_bytes=2**20)
    data = {"a": ["e\u0301", 10**37, None, ""]}
    pointer = blobs.put(exactjson.dumps(data))
    assert blobs.put(exactjson.dumps(data)) == pointer
    assert list(objects.stored) == [pointer.key]
    assert pointer.key.startswith("blobs/")
    assert pointer.size == len(exactjson.dumps(data))
    assert blobs.get(pointer) == data


def test_data_kept_apart_survives_another_compressor() -> None:
    """The content decides, not its compressed form: what another version of the compressor stored is read whole."""
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
def test_a_pointer_that_lies_is_untrusted(changes: Mapping[str, Any]) -> None:
    """A pointer outside of the prefix or the bounds, or to other bytes than it says, is not followed."""
    objects = MemoryObjects()
    blobs = Blobs(objects=objects, prefix="blobs/", max_bytes=2**20)
    pointer = blobs.put(exactjson.dumps({"a": "x" * 1_000}))
    objects.stored["payloads/r1"] = objects.stored[pointer.key]
    with pytest.raises(IntegrityError):
        blobs.get(msgspec.structs.replace(pointer, **changes))
