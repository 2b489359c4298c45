"""A model of the store in plain Python, written from the text of the design and not from the code.

The model says what an op needs and does, why it is refused, which operations of a request apply together, and in which order.
It has no lanes, transactions or receipts: a request is a list of operations, and a store is a state per key.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mdstore.model import Operation, Reason

Key = tuple[str, str]  # entity, key
OperationInput = Operation | bytes  # bytes: a line that cannot be read
Reasons = frozenset[Reason]  # the store may give any of them; if empty, the operation applies
APPLIED: Reasons = frozenset()


@dataclass(frozen=True, kw_only=True)
class Known:
    """The state of one key. A tombstone is `deleted` and has no data; its version and sequence continue to count."""

    data: dict[str, Any] | None
    version: int
    sequence: int | None = None
    deleted: bool = False


States = dict[Key, Known]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules that depend on the deployment: the most members of a group, the most bytes of JSON, and two special entities.

    A record of `typed` must have an integer `n` of 0 or more; DynamoDB rejects every write of `odd` as malformed.
    """

    group: int
    size: int
    typed: str = "typed"
    odd: str = "odd"

    def data_errors(self, entity: str, data: dict[str, Any]) -> Reasons:
        """Return why a record of `entity` cannot have `data`."""
        if len(json.dumps(data, separators=(",", ":"))) > self.size:
            return frozenset({Reason.TOO_LARGE})
        number = data.get("n")
        if entity == self.typed and (not isinstance(number, int) or number < 0):
            return frozenset({Reason.INVALID})
        return APPLIED

    def before_sending(self, source: OperationInput) -> Reasons:
        """Return why an operation is refused whatever the records are."""
        if isinstance(source, bytes):
            return frozenset({Reason.INVALID})
        if (source.data is None) != (source.op in ("delete", "check")):
            return frozenset({Reason.INVALID})
        if source.data is None:
            return APPLIED
        errors = self.data_errors(source.entity, source.data)
        # Whether a patch fits the entity depends on the record that it is merged into.
        return errors - {Reason.INVALID} if source.op == "patch" else errors

    def reasons(self, operation: Operation, known: Known | None) -> Reasons:
        """Return every reason for which `operation` may be refused, given the state of its key."""
        found: set[Reason] = set()
        present = known is not None and not known.deleted
        if operation.op == "insert" and present:
            found.add(Reason.EXISTS)
        # A delete with a sequence needs no record: its tombstone keeps older operations out that arrive later.
        needs_record = operation.op in ("update", "patch", "check") or (
            operation.op == "delete" and operation.sequence is None
        )
        if needs_record and not present:
            found.add(Reason.MISSING)
        if operation.expect_version is not None and not (
            known and present and known.version == operation.expect_version
        ):
            found.add(Reason.VERSION_MISMATCH)
        if operation.sequence is not None and known and known.sequence is not None:
            found |= {Reason.STALE} if known.sequence >= operation.sequence else set()
        if operation.op == "patch" and known and present:
            found |= self.data_errors(operation.entity, merged(known.data, operation.data))
        if operation.entity == self.odd:
            found.add(Reason.INVALID)
        return frozenset(found)


def effect(operation: Operation, known: Known | None) -> Known | None:
    """Return the state of a key after `operation` applied to it."""
    if operation.op == "check":
        return known
    data = operation.data
    if operation.op == "patch":
        assert known is not None
        data = merged(known.data, data)
    sequence = operation.sequence
    if sequence is None and known is not None:
        sequence = known.sequence
    version = 1 if known is None else known.version + 1
    return Known(data=data, version=version, sequence=sequence, deleted=operation.op == "delete")


def merged(target: Any, patch: Any) -> Any:
    """Merge `patch` into `target` as the pseudocode of RFC 7396 (JSON Merge Patch) does."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            if name in result:
                del result[name]
        else:
            result[name] = merged(result.get(name), value)
    return result


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Operations, by index, that apply together: those of a group, or a single one."""

    members: tuple[int, ...]
    group: str | None = None


@dataclass(kw_only=True)
class Plan:
    """The order in which a request must be carried out.

    `early` has the refusals that do not depend on the records. `units` has all other operations. `before` maps each unit to the
    units that must precede it: those with an earlier operation on one of its keys.
    """

    rules: Rules
    operations: dict[int, Operation]
    early: dict[int, Reasons]
    units: list[Unit]
    before: dict[Unit, set[Unit]] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Sequence[OperationInput], rules: Rules) -> Plan:
        """Return the plan of a request."""
        operations = {index: source for index, source in enumerate(sources) if isinstance(source, Operation)}
        early = _refused_early(sources, rules)
        units: dict[Any, Unit] = {}
        for index, operation in operations.items():
            if index not in early:
                name = index if operation.group is None else operation.group
                earlier = units[name].members if name in units else ()
                units[name] = Unit(members=(*earlier, index), group=operation.group)
        plan = cls(rules=rules, operations=operations, early=early, units=list(units.values()))
        plan.before = plan._ordered(plan.units)
        return plan

    def key(self, index: int) -> Key:
        """Return the key of an operation."""
        return self.operations[index].entity, self.operations[index].key

    def without(self, refused: Iterable[Unit]) -> Plan:
        """Return the plan without the units `refused`."""
        removed = set(refused)
        units = [unit for unit in self.units if unit not in removed]
        return Plan(
            rules=self.rules, operations=self.operations, early=self.early, units=units, before=self._ordered(units)
        )

    def _ordered(self, units: Sequence[Unit]) -> dict[Unit, set[Unit]]:
        before: dict[Unit, set[Unit]] = {unit: set() for unit in units}
        on_key: dict[Key, list[tuple[int, Unit]]] = defaultdict(list)
        for unit in units:
            for index in unit.members:
                on_key[self.key(index)].append((index, unit))
        for line in on_key.values():
            line.sort(key=lambda pair: pair[0])
            for position, (_, unit) in enumerate(line):
                before[unit] |= {other for _, other in line[:position]}
        return before

    def cycles(self) -> list[set[Unit]]:
        """Return the sets of units that wait for each other, so that no order satisfies all of them."""
        reached = {unit: self._all_before(unit) for unit in self.units}
        cycles = {unit: frozenset(o for o in reached[unit] if unit in reached[o]) for unit in self.units}
        return [set(cycle) for cycle in {cycle for unit, cycle in cycles.items() if unit in cycle}]

    def _all_before(self, unit: Unit) -> set[Unit]:
        found: set[Unit] = set()
        waiting = [unit]
        while waiting:
            more = self.before[waiting.pop()] - found
            found |= more
            waiting += more
        return found

    def interleaved(self, refused: Mapping[int, Reason]) -> list[Unit]:
        """Return the groups that were refused because they wait for each other; raises if the wrong ones were refused.

        The design only says that such groups cannot all apply. So any choice is right that leaves at least one group of each
        cycle, and leaves no cycle.
        """
        found: list[Unit] = []
        for cycle in self.cycles():
            groups = {unit for unit in cycle if unit.group is not None}
            chosen = {u for u in groups if all(refused.get(index) is Reason.INVALID for index in u.members)}
            assert chosen != groups, f"all groups of a cycle are refused: {chosen}"
            found += chosen
        assert not self.without(found).cycles(), "groups were kept that no order satisfies"
        return found


def _refused_early(sources: Sequence[OperationInput], rules: Rules) -> dict[int, Reasons]:
    found = {index: why for index, source in enumerate(sources) if (why := rules.before_sending(source))}
    unreadable = any(isinstance(source, bytes) for source in sources)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, source in enumerate(sources):
        if isinstance(source, Operation) and source.group is not None:
            groups[source.group].append(index)
    for indexes in groups.values():
        members = [source for index in indexes if isinstance(source := sources[index], Operation)]
        keys = [(one.entity, one.key) for one in members]
        reasons: set[Reason] = set()
        if len(keys) > rules.group or len(set(keys)) < len(keys):
            reasons.add(Reason.INVALID)
        if unreadable or any(index in found for index in indexes):  # an unreadable line may belong to any group
            reasons.add(Reason.GROUP_REFUSED)
        if reasons:
            found |= {index: frozenset(reasons) for index in indexes if index not in found}
    return found


def apply(plan: Plan, states: States) -> dict[int, Reasons]:
    """Carry out a plan on `states`; returns for each operation why it may be refused, or no reason if it applies.

    Units that do not wait for each other share no key, so every order that the plan allows has the same result.
    """
    outcomes = dict(plan.early)
    done: set[Unit] = set()
    while len(done) < len(plan.units):
        unit = next(unit for unit in plan.units if unit not in done and plan.before[unit] <= done)
        done.add(unit)
        why = {i: plan.rules.reasons(plan.operations[i], states.get(plan.key(i))) for i in unit.members}
        if any(why.values()):
            others = frozenset({Reason.GROUP_REFUSED}) if unit.group is not None else APPLIED
            outcomes |= {index: reasons | others for index, reasons in why.items()}
            continue
        outcomes |= dict.fromkeys(unit.members, APPLIED)
        for index in unit.members:
            after = effect(plan.operations[index], states.get(plan.key(index)))
            if after is not None:
                states[plan.key(index)] = after
    return outcomes
