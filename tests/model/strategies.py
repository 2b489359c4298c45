"""Random requests and schedules in which events that are rare in production are frequent."""

from __future__ import annotations

import operator
from typing import Any

import msgspec
from hypothesis import strategies as st

from mdstore.model import Operation, OpName
from tests.model.environment import GROUP, RULES
from tests.model.model import OperationInput
from tests.model.schedule import Act, Step
from tests.model.tasks import Requests

_PAD = "x" * 1_000  # of three pads, two make data too large for an item, and three make it too large for a record
_KEYS = [("e", "a"), ("e", "b"), ("e", "c"), (RULES.typed, "a"), ("e", "d"), ("e", "f")]
_ODD = (RULES.odd, "a")
_BROKEN = b'{"op":'
_OPS: list[OpName] = ["upsert", "patch", "patch", "insert", "delete", "update", "check"]
_CONTENDING_OPS: list[OpName] = [*_OPS, "patch", "patch", "patch", "patch", "patch"]
_NO_DATA = ("delete", "check")
#: Kinds of operations: valid, with data that the op must not have (or without data that it needs), malformed for DynamoDB,
#: and unreadable.
_KINDS = ["valid"] * 50 + ["wrong data", "odd", "odd", "broken"]
#: Failing examples shrink towards the acts listed first.
_ACTS = [Act.GO] * 12 + [Act.START] * 8 + [act for act in Act if act not in (Act.GO, Act.START)]

_fields: dict[str, st.SearchStrategy[Any]] = {
    "n": st.sampled_from([1, 2, 3, -1, None]),
    "m": st.dictionaries(st.sampled_from("xy"), st.sampled_from([1, None, {}, {"z": 2}]), max_size=2),
    "p": st.none(),
}
_padded = st.sampled_from(["", "", "", "p", "q", "pq", "qr", "pqr"]).map(lambda names: dict.fromkeys(names, _PAD))
_data = st.builds(operator.or_, st.fixed_dictionaries({}, optional=_fields), _padded)
_groups = st.sampled_from([None, None, None, "g", "h"])


def _rarely(choices: list[int]) -> st.SearchStrategy[int | None]:
    return st.sampled_from([None] * 2 * len(choices) + choices)


@st.composite
def _operation(draw: st.DrawFn, *, with_odd: bool) -> OperationInput:
    kind = draw(st.sampled_from(_KINDS))
    if kind == "broken":
        return _BROKEN
    op = draw(st.sampled_from(_OPS))
    entity, key = _ODD if with_odd and kind == "odd" else draw(st.sampled_from(_KEYS))
    data = draw(_data) if (op not in _NO_DATA) != (kind == "wrong data") else None
    if data is not None and entity == RULES.typed and op != "patch":
        data = {"n": 1, **data}
    return Operation(
        op=op,
        entity=entity,
        key=key,
        data=data,
        expect_version=None if op == "insert" else draw(_rarely([1, 2, 3])),
        sequence=None if op == "check" else draw(_rarely([2, 3, 4])),
        group=draw(_groups),
    )


def _first(key: tuple[str, str], kind: str) -> list[OperationInput]:
    """Return operations that bring a key into the state `kind`: nothing, a record, one with a sequence, or a tombstone."""
    sequence = 2 if kind == "sequenced" else None
    made = Operation(op="insert", entity=key[0], key=key[1], data={"n": 1}, sequence=sequence)
    gone = Operation(op="delete", entity=key[0], key=key[1])
    kinds: dict[str, list[OperationInput]] = {
        "nothing": [],
        "record": [made],
        "sequenced": [made],
        "tombstone": [made, gone],
    }
    return kinds[kind]


_beginnings = (
    st.tuples(*[st.sampled_from(["record", "tombstone", "sequenced", "nothing"])] * len(_KEYS))
    .map(lambda kinds: [source for key, kind in zip(_KEYS, kinds, strict=True) for source in _first(key, kind)])
    .filter(bool)  # a request of no operations is refused
)


def _signed(source: OperationInput, request_id: str, index: int) -> OperationInput:
    """Return the operation with its request and index in its data, so that no two operations write the same."""
    if isinstance(source, bytes) or source.data is None:
        return source
    return msgspec.structs.replace(source, data={**source.data, "by": f"{request_id}:{index}"})


@st.composite
def _with_groups(draw: st.DrawFn, sources: list[OperationInput]) -> list[OperationInput]:
    """Add a large group or a cycle to the operations.

    The large group has as many operations as a group may have, or one more. The cycle is two or three groups that wait for
    each other.
    """
    count = draw(st.sampled_from([2, 3]))
    cycle = [(key, group) for key in range(count) for group in (key, (key + 1) % count)]
    large = [(key, 0) for key in range(draw(st.sampled_from([GROUP, GROUP + 1])))]
    added = draw(st.sampled_from([cycle, large]))
    size = len(added)
    places = sorted(draw(st.lists(st.integers(0, len(sources)), min_size=size, max_size=size)), reverse=True)
    found = list(sources)
    for place, (key, group) in zip(places, reversed(added), strict=True):
        entity, name = _KEYS[key]
        found.insert(place, Operation(op="upsert", entity=entity, key=name, data={"n": 1}, group=f"more{group}"))
    return found


def _named(lists: list[list[OperationInput]]) -> Requests:
    return {
        f"r{number}": [_signed(source, f"r{number}", index) for index, source in enumerate(sources)]
        for number, sources in enumerate(lists)
    }


@st.composite
def requests(draw: st.DrawFn, *, most: int = 2, operations: int = 8, with_odd: bool = True) -> Requests:
    """Generate requests by id: one that makes some records, and 1 to `most` with random operations."""
    some = st.lists(_operation(with_odd=with_odd), min_size=2, max_size=operations)
    some = some.flatmap(lambda found: st.one_of([st.just(found)] * 5 + [_with_groups(found)]))
    return _named([draw(_beginnings), *draw(st.lists(some, min_size=1, max_size=most))])


@st.composite
def _contending_operation(draw: st.DrawFn) -> OperationInput:
    """Generate an operation, mostly a patch, on one of two records."""
    op = draw(st.sampled_from(_CONTENDING_OPS))
    data = {"m": {draw(st.sampled_from("xyz")): draw(st.sampled_from([1, 2, None]))}}
    return Operation(
        op=op,
        entity="e",
        key=draw(st.sampled_from("ab")),
        data=None if op in _NO_DATA else data,
        expect_version=None if op == "insert" else draw(_rarely([2])),
        group=draw(_groups),
    )


def contending_requests() -> st.SearchStrategy[Requests]:
    """Generate a request that makes two records, and three requests that change them."""
    made: list[OperationInput] = [Operation(op="insert", entity="e", key=key, data={"m": {"x": 0}}) for key in "ab"]
    some = st.lists(_contending_operation(), min_size=1, max_size=4)
    return st.tuples(some, some, some).map(lambda lists: _named([made, *lists]))


def schedules(*, least: int = 20, most: int = 80) -> st.SearchStrategy[list[Step]]:
    """Generate the first steps of a run; after them a run continues without faults."""
    return st.lists(st.builds(Step, st.sampled_from(_ACTS), st.integers(0, 11)), min_size=least, max_size=most)
