"""A request of operations of every kind, and the result that the model of the store predicts for it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mdstore.client import Client
from mdstore.model import Counts, Operation, OpName, Reason, State
from tests.model.history import check_prediction
from tests.model.model import Known, Plan, Rules, States, apply

RULES = Rules(group=99, size=16 * 2**20)
_LARGE = 450_000  # bytes; an item cannot hold a text of this size


class Expected:
    """Operations in the order of a request; `check` compares their outcomes with the model's."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self._plan = Plan.of(operations, RULES)
        self.states: States = {}
        self._legal = apply(self._plan, self.states)

    def check(self, client: Client, request_id: str) -> None:
        """Assert that outcomes, counts and records are those that the model predicts, and that `verify` finds no fault."""
        request = client.status(request_id)
        assert (request.state, request.error) == (State.COMPLETED, "")
        outcomes = list(client.outcomes(request_id))
        assert sorted(one.index for one in outcomes) == list(range(len(self.operations)))
        found = {one.index: Reason(one.reason) if one.outcome == "refused" else None for one in outcomes}
        check_prediction(self._plan, self._legal, found)
        applied = Counter(str(self.operations[index].op) for index, reason in found.items() if reason is None)
        refused = Counter(str(reason) for reason in found.values() if reason is not None)
        assert request.counts == Counts(applied=dict(applied), refused=dict(refused))
        keys = {(operation.entity, operation.key) for operation in self.operations}
        records = client.store.records.look_up(keys)
        assert self.states == {
            key: Known(data=record.data, version=record.version, sequence=record.sequence, deleted=record.deleted)
            for key, record in records.items()
        }
        assert client.verify(request_id).faults == []


def families(entity: str, count: int, *, large: int = 0) -> list[Operation]:
    """Return `count` families of 14 operations: several per key, patches, refusals, groups. The first `large` need S3."""
    found: list[Operation] = []
    for number in range(count):
        found += _family(entity, f"{number}-", is_large=number < large)
    return found


def _family(entity: str, prefix: str, *, is_large: bool) -> list[Operation]:
    def op(name: OpName, key: str, data: dict[str, Any] | None = None, **more: Any) -> Operation:
        return Operation(op=name, entity=entity, key=prefix + key, data=data, **more)

    text = "x" * _LARGE if is_large else "short"
    return [
        op("insert", "patched", {"n": 1, "text": text}),
        op("insert", "twice", {"n": 1}),
        op("patch", "patched", {"more": {"x": [1]}}),
        op("insert", "twice", {"n": 2}),
        op("update", "never", {"n": 1}),
        op("upsert", "grouped", {"n": 1}, group=f"{prefix}applies"),
        op("insert", "beside", {"n": 1}, group=f"{prefix}applies"),
        op("upsert", "refused", {"n": 1}, group=f"{prefix}refused"),
        op("patch", "never", {"n": 2}, group=f"{prefix}refused"),
        op("patch", "patched", {"n": None, "last": True}),
        op("delete", "twice"),
        op("insert", "twice", {"n": 3}),
        op("update", "grouped", {"n": 2}, sequence=5),
        op("upsert", "beside", {"n": 2}, expect_version=7),
    ]


def random_operations(dice: random.Random, entity: str, count: int) -> list[Operation]:
    """Return `count` operations on half as many keys: every op, right and wrong versions and sequences, and small groups."""
    keys = [f"k{number}" for number in range(max(1, count // 2))]
    groups: dict[str, set[str]] = {}
    return [_random(dice, entity, keys, groups) for _ in range(count)]


def _random(dice: random.Random, entity: str, keys: Sequence[str], groups: dict[str, set[str]]) -> Operation:
    op: OpName = dice.choice(["insert", "insert", "update", "patch", "patch", "upsert", "delete", "check"])
    key = dice.choice(keys)
    group = f"g{len(groups) if dice.random() < 0.4 else max(0, len(groups) - 1)}" if dice.random() < 0.3 else None
    if group is not None and key in groups.setdefault(group, set()):
        group = None
    if group is not None:
        groups[group].add(key)
    data = {"n": dice.randrange(10**9), "m": {dice.choice("xyz"): dice.choice([1, None])}}
    return Operation(
        op=op,
        entity=entity,
        key=key,
        data=None if op in ("delete", "check") else data,
        expect_version=dice.randint(1, 3) if op != "insert" and dice.random() < 0.2 else None,
        sequence=dice.randint(1, 9) if op != "check" and dice.random() < 0.2 else None,
        group=group,
    )
