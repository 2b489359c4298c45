"""Operations of every kind with the outcome that each must have, known by construction and not from the code under test."""

from __future__ import annotations

from typing import Any

from mdstore.client import Client
from mdstore.model import Counts, State

Operation = dict[str, Any]
Expected = tuple[str, str]  # outcome, reason

_LOADED = 60  # operations per block in the first request
_LARGE = 450_000  # characters: more than an item holds


class Workload:
    """`blocks` x 80 operations in two requests: per block, `load` has 60 inserts and `change` 20 operations of every kind.

    `change` works on the records of `load`. Each of the first `large` blocks has a record whose data is too large for an item.
    """

    def __init__(self, entity: str, *, blocks: int, large: int = 0) -> None:
        self.entity = entity
        self.load: list[Operation] = []
        self.change: list[Operation] = []
        self.expected: dict[str, list[Expected]] = {"load": [], "change": []}
        self.records: dict[str, tuple[int, Any]] = {}  # version and data by key
        self.deleted: dict[str, int] = {}  # version of the tombstone by key
        self._applied: dict[str, dict[str, int]] = {"load": {}, "change": {}}
        self._refused: dict[str, dict[str, int]] = {"load": {}, "change": {}}
        for number in range(blocks):
            self._load_block(number, is_large=number < large)
            self._change_block(number)

    @property
    def size(self) -> int:
        """The number of operations in both requests."""
        return len(self.load) + len(self.change)

    def check(self, client: Client, name: str) -> None:
        """Assert that the request `name` (`load` or `change`) has exactly the expected outcomes, and verifies."""
        request = client.status(f"{self.entity}/{name}")
        assert (request.state, request.error) == (State.COMPLETED, ""), request
        expected = Counts(applied=self._applied[name], refused=self._refused[name])
        assert request.counts == expected, (request.counts, expected)
        lanes = client.store.ledger.lanes(request.request_id)
        assert [(lane.lane, lane.state, lane.error) for lane in lanes] == [
            (number, State.COMPLETED, "") for number in range(request.lanes if request.lanes > 1 else 0)
        ]
        outcomes = list(client.outcomes(request.request_id))
        assert sorted(one.index for one in outcomes) == list(range(len(self.expected[name])))
        found = {one.index: (one.outcome, one.reason) for one in outcomes}
        wrong = [
            (index, found[index], wanted) for index, wanted in enumerate(self.expected[name]) if found[index] != wanted
        ]
        assert wrong == [], (len(wrong), wrong[:5])
        proof = client.verify(request.request_id)
        assert (proof.operations, proof.faults) == (len(outcomes), []), proof

    def check_records(self, client: Client) -> None:
        """Assert that exactly the expected records exist, with data and version, and that deleted ones have tombstones."""
        found = {record.key: (record.version, record.data) for record in client.export(self.entity)}
        assert found.keys() == self.records.keys(), sorted(found.keys() ^ self.records.keys())[:5]
        wrong = [(key, found[key], wanted) for key, wanted in self.records.items() if found[key] != wanted]
        assert wrong == [], (len(wrong), wrong[:5])
        tombstones = client.store.records.look_up((self.entity, key) for key in self.deleted)
        assert {key: (one.version, one.deleted) for (_, key), one in tombstones.items()} == {
            key: (version, True) for key, version in self.deleted.items()
        }

    def _add(self, request: str, op: str, key: str, data: Any = None, *, refused: str = "", **more: Any) -> None:
        operation = {"op": op, "entity": self.entity, "key": key, **more}
        if data is not None:
            operation["data"] = data
        (self.load if request == "load" else self.change).append(operation)
        self.expected[request].append(("refused", refused) if refused else ("applied", ""))
        counts, name = (self._refused, refused) if refused else (self._applied, op)
        counts[request][name] = counts[request].get(name, 0) + 1

    def _load_block(self, number: int, *, is_large: bool) -> None:
        for place in range(_LOADED - 1):
            key = f"{number}-{place}"
            text = "é" * (_LARGE // 2) if is_large and place == 3 else f"record {key}"
            data = {"n": number, "place": place, "text": text, "tags": ["a", {"b": None}]}
            self._add("load", "insert", key, data)
            self.records[key] = (1, data)
        self._add("load", "insert", f"{number}-0", {"n": -1}, refused="exists")

    def _change_block(self, number: int) -> None:
        keys = [f"{number}-{place}" for place in range(14)]
        new = {"n": number, "changed": True}

        self._write("update", keys[0], {"n": number, "was": "updated"})
        self._patch(keys[0], {"was": None, "more": {"x": [number]}})
        self._write("update", keys[1], new)
        self._write("update", keys[2], new)
        self._patch(keys[3], {"n": -number, "tags": None})
        self._patch(keys[4], {"text": {"now": "an object"}})
        self._write("upsert", keys[5], new)
        self._write("upsert", keys[6], new)
        self._write("upsert", f"{number}-new", new)
        self._delete(keys[7])
        self._delete(keys[8])
        self._write("upsert", keys[8], new)
        self._add("change", "insert", keys[9], new, refused="exists")
        self._add("change", "update", f"{number}-none", new, refused="missing")
        self._add("change", "patch", f"{number}-none", new, refused="missing")
        applies, refused = f"{number}-applies", f"{number}-refused"
        self._write("update", keys[10], new, group=applies)
        self._write("insert", f"{number}-grouped", new, group=applies)
        self._add("change", "check", keys[11], expect_version=1, group=applies)
        self._add("change", "update", keys[12], new, refused="version_mismatch", expect_version=7, group=refused)
        self._add("change", "delete", keys[13], refused="group_refused", group=refused)

    def _write(self, op: str, key: str, data: Any, **more: Any) -> None:
        self._add("change", op, key, data, **more)
        version = self.deleted.pop(key, 0) or self.records.get(key, (0, None))[0]
        self.records[key] = (version + 1, data)

    def _patch(self, key: str, patch: dict[str, Any]) -> None:
        self._add("change", "patch", key, patch)
        version, data = self.records[key]
        changed = {name: value for name, value in {**data, **patch}.items() if value is not None}
        self.records[key] = (version + 1, changed)

    def _delete(self, key: str) -> None:
        self._add("change", "delete", key)
        self.deleted[key] = self.records.pop(key)[0] + 1
