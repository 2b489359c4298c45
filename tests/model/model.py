"""The store in plain Python, from the words of the design and not from the code.

What an op needs and does, why it is refused, which operations of a request apply together, and in which order. It knows
nothing of lanes, transactions and receipts: a request is its operations, and a store is a state for each key.
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
Reasons = frozenset[Reason]  # any of which may be given; none: the operation applies
APPLIED: Reasons = frozenset()


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of one key. A tombstone is `deleted`, without data; its version and sequence go on counting."""

    data: dict[str, Any] | None
    version: int
    sequence: int | None = None
    deleted: bool = False


States = dict[Key, Known]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What depends on the deployment: members of a group and bytes of JSON at the most, and two kinds of entities.

    A record of `typed` must have an integer `n` of 0 or more; DynamoDB calls all writes of `odd` malformed.
    """

    group: int
    size: int
    typed: str = "typed"
    odd: str = "odd"

    def flaws(self, entity: str, data: dict[str, Any]) -> Reasons:
        """Why a record of `entity` cannot have `data`."""
        if len(json.dumps(data, separators=(",", ":"))) > self.size:
            return frozenset({Reason.TOO_LARGE})
        number = data.get("n")
        if entity == self.typed and (not isinstance(number, int) or number < 0):
            return frozenset({Reason.INVALID})
        return APPLIED

    def before_sending(self, source: OperationInput) -> Reasons:
        """Why an operation is refused whatever the records are."""
        if isinstance(source, bytes):
            return frozenset({Reason.INVALID})
        if (source.data is None) != (source.op in ("delete", "check")):
            return frozenset({Reason.INVALID})
        if source.data is None:
            return APPLIED
        flaws = self.flaws(source.entity, source.data)
        # A patch is no record yet: whether it fits the entity is seen by what it makes of one.
        return flaws - {Reason.INVALID} if source.op == "patch" else flaws

    def reasons(self, operation: Operation, known: Known | None) -> Reasons:
        """Every reason for which `operation` may be refused, given what is known of its key."""
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
            found |= self.flaws(operation.entity, merged(known.data, operation.data))
        if operation.entity == self.odd:
            found.add(Reason.INVALID)
        return frozenset(found)


def effect(operation: Operation, known: Known | None) -> Known | None:
    """What becomes of a key that `operation` applies to."""
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
    """JSON Merge Patch, after the pseudocode of RFC 7396."""
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
    """What applies together: the operations of a group, or a single one; by index."""

    members: tuple[int, ...]
    group: str | None = None


@dataclass(kw_only=True)
class Plan:
    """A request as it must be carried out.

    `early` has the refusals that do not depend on the records. `units` are all others, each with the units `before` it:
    those that have an operation before one of its own, on the same key.
    """

    rules: Rules
    operations: dict[int, Operation]
    early: dict[int, Reasons]
    units: list[Unit]
    before: dict[Unit, set[Unit]] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Sequence[OperationInput], rules: Rules) -> Plan:
        """The plan of a request."""
        operations = {index: source for index, source in enumerate(sources) if isinstance(source, Operation)}
        early = _refused_early(sources, rules)
        units: dict[Any, Unit] = {}
        for index, operation in operations.items():
            if index not in early:
                name = index if operation.group is None else operation.group
                former = units[name].members if name in units else ()
                units[name] = Unit(members=(*former, index), group=operation.group)
        plan = cls(rules=rules, operations=operations, early=early, units=list(units.values()))
        plan.before = plan._ordered(plan.units)
        return plan

    def key(self, index: int) -> Key:
        """The key of an operation."""
        return self.operations[index].entity, self.operations[index].key

    def without(self, refused: Iterable[Unit]) -> Plan:
        """The plan when some units are refused as such."""
        gone = set(refused)
        units = [unit for unit in self.units if unit not in gone]
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

    def knots(self) -> list[set[Unit]]:
        """Units that wait for each other, so that no order has them all."""
        reached = {unit: self._all_before(unit) for unit in self.units}
        circles = {unit: frozenset(o for o in reached[unit] if unit in reached[o]) for unit in self.units}
        return [set(knot) for knot in {circle for unit, circle in circles.items() if unit in circle}]

    def _all_before(self, unit: Unit) -> set[Unit]:
        found: set[Unit] = set()
        waiting = [unit]
        while waiting:
            more = self.before[waiting.pop()] - found
            found |= more
            waiting += more
        return found

    def interleaved(self, refused: Mapping[int, Reason]) -> list[Unit]:
        """The groups that were refused because no order has them and others; raises where that was not called for.

        The design says of such groups only that they cannot all apply, so any choice will do that leaves an order, and
        of each knot a group.
        """
        gone: list[Unit] = []
        for knot in self.knots():
            groups = {unit for unit in knot if unit.group is not None}
            chosen = {u for u in groups if all(refused.get(index) is Reason.INVALID for index in u.members)}
            assert chosen != groups, f"all groups of a knot are refused: {chosen}"
            gone += chosen
        assert not self.without(gone).knots(), "groups were kept that no order has"
        return gone


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
        flaws: set[Reason] = set()
        if len(keys) > rules.group or len(set(keys)) < len(keys):
            flaws.add(Reason.INVALID)
        if unreadable or any(index in found for index in indexes):  # an unreadable line may be of any group
            flaws.add(Reason.GROUP_REFUSED)
        if flaws:
            found |= {index: frozenset(flaws) for index in indexes if index not in found}
    return found


def apply(plan: Plan, states: States) -> dict[int, Reasons]:
    """Carry out a plan on `states`; returns for each operation why it may be refused, nothing where it applies.

    Units that do not wait for each other share no key, so every order that keeps the plan's gives the same.
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
