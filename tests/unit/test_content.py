"""A repeat of a request is recognised by its content, however it is written and whatever becomes of its operations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from mdstore import exactjson
from mdstore.errors import InvalidOperations, RequestConflict
from mdstore.model import Operation, Reference
from mdstore.settings import Settings
from mdstore.store.content import ContentDigest, sorted_json
from mdstore.store.entities import Entities
from mdstore.store.ingestor import Ingestor
from mdstore.store.payload import MAGIC, Payloads
from mdstore.store.payload_builder import OperationInput, PayloadBuilder
from mdstore.store.validation import Validator
from tests.unit.fakes import MemoryObjects
from tests.unit.test_ingestor import FakeLedger

DATA = b'{"a":1.5,"b":{"c":[1,null],"d":"\xc3\xa9"},"n":100}'
LINE = b'{"op":"upsert","entity":"e","key":"k","data":%b,"sequence":7}' % DATA
MIXED = b'{"n":100,"b":{"d":"\xc3\xa9","c":[1,null]},"a":1.5}'
#: The same operation, written in other ways.
SAME: dict[str, OperationInput] = {
    "other order of names": b'{"sequence":7,"key":"k","data":%b,"entity":"e","op":"upsert"}' % MIXED,
    "white space": LINE.replace(b":", b" : ").replace(b",", b",\t") + b" \n",
    "escapes": LINE.replace(b"\xc3\xa9", b"\\u00e9"),
    "a fraction with a zero": LINE.replace(b"1.5", b"1.50"),
    "exponents": LINE.replace(b"1.5", b"15e-1").replace(b"100", b"1.0E2"),
    "fields that are null": LINE.replace(b'"sequence":7', b'"sequence":7,"group":null,"expect_version":null'),
    "a mapping": json.loads(LINE),
    "an operation": Operation(
        op="upsert", entity="e", key="k", sequence=7,
        data={"b": {"c": [1, None], "d": "é"}, "a": Decimal("1.500"), "n": 100.0},
    ),
}  # fmt: skip
OTHER: dict[str, bytes] = {
    "another op": LINE.replace(b"upsert", b"update"),
    "another value": LINE.replace(b"1.5", b"1.51"),
    "text for a number": LINE.replace(b"1.5", b'"1.5"'),
    "null for an absent name": LINE.replace(b'"n":100', b'"n":100,"x":null'),
    "another order of a list": LINE.replace(b"[1,null]", b"[null,1]"),
    "no sequence": LINE.replace(b',"sequence":7', b""),
}


def content_of(operations: Iterable[OperationInput], **options: Any) -> str:
    """Return the content digest of operations, of which any may be refused."""
    validator = options.pop("validator", None) or Validator(entities=Entities(), max_record_bytes=2**20)
    with closing(PayloadBuilder(validator=validator, settings=Settings(), **options)) as builder:
        for operation in operations:
            builder.add(operation)
        return builder.contents()[0]


@pytest.mark.parametrize("name", SAME)
def test_the_same_operation_written_otherwise_is_the_same_content(name: str) -> None:
    """What counts are the JSON values."""
    assert content_of([SAME[name]]) == content_of([LINE])


@pytest.mark.parametrize("name", OTHER)
def test_another_operation_is_other_content(name: str) -> None:
    """Each difference in a value counts."""
    assert content_of([OTHER[name]]) != content_of([LINE])


def test_the_order_and_the_number_of_operations_count() -> None:
    """Operations on one key apply in their order, and a repeated one is one more write."""
    other = LINE.replace(b'"k"', b'"l"')
    assert len({content_of(given) for given in ([LINE, other], [other, LINE], [LINE], [LINE, LINE], [])}) == 5
    assert content_of([LINE], newest_wins=True) != content_of([LINE])


text = st.text(st.characters(codec="utf-8"))
floats = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(-(10**36), 10**36) | floats | st.decimals(-(10**12), 10**12, allow_nan=False, places=6)
values = st.recursive(
    st.none() | st.booleans() | text | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(text, values, max_size=4))
def test_the_fast_way_and_the_slow_way_agree(data: dict[str, Any]) -> None:
    """A valid operation is digested from its own encoding, which is canonical unless it may hold a number that is not."""
    operation = Operation(op="upsert", entity="e", key="k", data=data)
    fast, slow = ContentDigest(), ContentDigest()
    fast.add(operation, sorted_json(operation))
    slow.add_refused(exactjson.dumps(operation), max_bytes=2**30, max_values=2**30)
    assert fast.text() == slow.text()


REFUSED: list[Any] = [
    b"not json", b'{"op":"nope"}', b"[]", b"1e999999999", b'{"op":"upsert","entity":"e","key":"k","data":{"n":1e99999999}}',
    b"\xff", b'{"op":"upsert","entity":"e","key":"k","data":{"n":' + b"1" * 50 + b"}}", {"op": float("nan")}, {"op": object},
    {"key": "\ud800"}, {1: 2}, Operation(op="upsert", entity="e", key="k", data={"n": float("inf")}),
]  # fmt: skip


def test_operations_that_are_refused_count_too() -> None:
    """Each has a digest of its own, and computing it takes no time however large the number is that it names."""
    assert len({content_of([one]) for one in REFUSED}) == len(REFUSED)
    assert content_of([b'{"op":"nope","key":"k"}']) == content_of([{"key": "k", "op": "nope"}])


class Model(BaseModel):
    n: int = Field(ge=0)


def test_what_becomes_of_an_operation_does_not_count() -> None:
    """Another release, another model or another limit may refuse an operation, or move its data to S3."""
    line = b'{"op":"upsert","entity":"e","key":"k","data":{"n":-1,"text":"' + b"x" * 2_000 + b'"}}'
    strict = Validator(entities=Entities({"e": Model}), max_record_bytes=2**20)
    assert content_of([line], validator=strict) == content_of([line])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdstore.store.validation.MAX_INLINE", 1_000)
        patch.setattr("mdstore.store.validation._SURELY_INLINE", 500)
        assert content_of([line]) == content_of(
            [{"data": {"text": "x" * 2_000, "n": -1}, "key": "k", "entity": "e", "op": "upsert"}]
        )


class Bench:
    """An ingestor whose entity models change."""

    def __init__(self) -> None:
        self.ledger = FakeLedger()
        self.objects = MemoryObjects()
        self.payloads = Payloads(objects=self.objects, prefix="payloads/", max_lane_bytes=2**26)

    def submit(self, *operations: OperationInput, models: Mapping[str, Any] | None = None, **more: Any) -> Any:
        ingestor = Ingestor(
            payloads=self.payloads,
            ledger=self.ledger,
            validator=Validator(entities=Entities(dict(models or {})), max_record_bytes=2**20),
            settings=Settings(),
            clock=lambda: 0.0,
        )
        return ingestor.accept(operations, publish=lambda reference: reference, request_id="r", **more)

    def make_former(self, operations: Iterable[OperationInput]) -> Reference:
        """Store the payload of a request as release 0.1.0 did, with its digest of encoded lines."""
        validator = Validator(entities=Entities(), max_record_bytes=2**20)
        with closing(PayloadBuilder(validator=validator, settings=Settings())) as builder:
            for operation in operations:
                builder.add(operation)
            encoded, (_, former) = builder.encode("r", "default"), builder.contents()
        text = exactjson.dumps(msgspec.structs.replace(encoded.header, content=former))
        with encoded.body:
            body = encoded.body.read()
        sections = body[len(MAGIC) + 4 + len(exactjson.dumps(encoded.header)) :]
        self.objects.stored["payloads/r"] = MAGIC + len(text).to_bytes(4, "big") + text + sections
        reference, _ = self.payloads.find("r")
        return reference


@pytest.mark.parametrize("name", SAME)
def test_a_repeat_that_is_written_otherwise_is_a_repeat(name: str) -> None:
    """It is answered, and neither a conflict nor a new request."""
    bench = Bench()
    assert bench.submit(LINE).new
    assert not bench.submit(SAME[name]).new
    with pytest.raises(RequestConflict):
        bench.submit(OTHER["another value"])


def test_a_repeat_is_a_repeat_though_its_operations_are_invalid_by_now() -> None:
    """A stricter model, or `on_invalid`, decides about new requests only; the answer is that of the accepted request."""
    bench = Bench()
    line = b'{"op":"upsert","entity":"e","key":"k","data":{"n":-1}}'
    first = bench.submit(line)
    assert first.new
    for on_invalid in ("raise", "refuse"):
        again = bench.submit(line, models={"e": Model}, on_invalid=on_invalid)
        assert (again.new, again.reference, again.operations, again.refused) == (False, first.reference, 1, {})
    with pytest.raises(InvalidOperations):
        bench.submit(line, line, models={"e": Model})


def test_a_request_that_was_accepted_with_refusals_is_known_in_every_way() -> None:
    """Its repeat with `on_invalid="raise"` has the same content."""
    bench = Bench()
    accepted = bench.submit(LINE, b"no json", on_invalid="refuse")
    again = bench.submit(LINE, b"no json")
    assert (again.new, again.refused) == (False, accepted.refused) == (False, {"invalid": 1})


@pytest.mark.parametrize(
    "operations", [[LINE], [LINE, b"no json", {"op": "nope"}, LINE]], ids=["valid", "some refused"]
)
def test_a_payload_of_release_0_1_0_is_the_same_request(operations: list[OperationInput]) -> None:
    """Its digest is that of the encoded lines, so the same lines are recognised, and others are a conflict."""
    bench = Bench()
    former = bench.make_former(operations)
    assert bench.submit(*operations, on_invalid="refuse").reference == former
    with pytest.raises(RequestConflict):
        bench.submit(OTHER["another value"])
