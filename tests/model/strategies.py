"""Random requests and schedules, such that what is rare in the field is frequent here."""

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

_PAD = "x" * 1_000  # of three, any two make a record too large for an item, and all three for a record
_KEYS = [("e", "a"), ("e", "b"), ("e", "c"), (RULES.typed, "a"), ("e", "d"), ("e", "f")]
_ODD = (RULES.odd, "a")
_BROKEN = b'{"op":'
_OPS: list[OpName] = ["upsert", "patch", "patch", "insert", "delete", "update", "check"]
_QUARRELS: list[OpName] = [*_OPS, "patch", "patch", "patch", "patch", "patch"]
_NO_DATA = ("delete", "check")
#: What operations are: sound, or with data where none may be (or the other way round), malformed for DynamoDB, unreadable.
_KINDS = ["sound"] * 50 + ["flawed", "odd", "odd", "broken"]
#: What is listed first is what failing examples shrink to.
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
    data = draw(_data) if (op not in _NO_DATA) != (kind == "flawed") else None
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
    """Operations that make a key what `kind` says: nothing, a record, one with a sequence, or a tombstone."""
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


_beginnings = st.tuples(*[st.sampled_from(["record", "tombstone", "sequenced", "nothing"])] * len(_KEYS)).map(
    lambda kinds: [source for key, kind in zip(_KEYS, kinds, strict=True) for source in _first(key, kind)]
)


def _signed(source: OperationInput, request_id: str, index: int) -> OperationInput:
    """The operation with its name in its data, so that no two write the same."""
    if isinstance(source, bytes) or source.data is None:
        return source
    return msgspec.structs.replace(source, data={**source.data, "by": f"{request_id}:{index}"})


@st.composite
def _with_groups(draw: st.DrawFn, sources: list[OperationInput]) -> list[OperationInput]:
    """The operations, and among them a crowd or a knot.

    A crowd is a group as large as one may be, or larger. A knot is two or three groups that wait for each other in a circle.
    """
    count = draw(st.sampled_from([2, 3]))
    knot = [(key, group) for key in range(count) for group in (key, (key + 1) % count)]
    crowd = [(key, 0) for key in range(draw(st.sampled_from([GROUP, GROUP + 1])))]
    line = draw(st.sampled_from([knot, crowd]))
    places = sorted(draw(st.lists(st.integers(0, len(sources)), min_size=len(line), max_size=len(line))), reverse=True)
    found = list(sources)
    for place, (key, group) in zip(places, reversed(line), strict=True):
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
    """A request that makes some records, and 1 to `most` of random operations, by id."""
    some = st.lists(_operation(with_odd=with_odd), min_size=2, max_size=operations)
    some = some.flatmap(lambda found: st.one_of([st.just(found)] * 5 + [_with_groups(found)]))
    return _named([draw(_beginnings), *draw(st.lists(some, min_size=1, max_size=most))])


@st.composite
def _quarrel(draw: st.DrawFn) -> OperationInput:
    """Mostly patches of two records."""
    op = draw(st.sampled_from(_QUARRELS))
    data = {"m": {draw(st.sampled_from("xyz")): draw(st.sampled_from([1, 2, None]))}}
    return Operation(
        op=op,
        entity="e",
        key=draw(st.sampled_from("ab")),
        data=None if op in _NO_DATA else data,
        expect_version=None if op == "insert" else draw(_rarely([2])),
        group=draw(_groups),
    )


def quarrels() -> st.SearchStrategy[Requests]:
    """A request that makes two records, and three that change them."""
    made: list[OperationInput] = [Operation(op="insert", entity="e", key=key, data={"m": {"x": 0}}) for key in "ab"]
    some = st.lists(_quarrel(), min_size=1, max_size=4)
    return st.tuples(some, some, some).map(lambda lists: _named([made, *lists]))


def schedules(*, least: int = 20, most: int = 80) -> st.SearchStrategy[list[Step]]:
    """What happens at first; after it all goes well."""
    return st.lists(st.builds(Step, st.sampled_from(_ACTS), st.integers(0, 11)), min_size=least, max_size=most)
