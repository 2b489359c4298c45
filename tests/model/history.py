"""Replays transactions on the model, in the order in which they took effect. The model must allow each as its next step.

If it does, the run was serializable, in this order. A refusal has no effect on the records. It is right if its reason held at
some moment between the outcomes of the earlier operations on its keys and the receipt that contains the refusal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdstore.model import Reason
from tests.model.model import APPLIED, Key, Known, OperationInput, Plan, Rules, States, Unit, effect

Outcomes = dict[int, Reason | None]  # None: applied


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A transaction that took effect: its receipt, the keys of its other actions, and the records of those keys after it.

    A key occurs as often as its action applies operations.
    """

    request_id: str
    lane: int
    number: int
    keys: tuple[Key, ...]
    refused: Mapping[int, Reason]
    records: Mapping[Key, Known | None]


class Faulty(AssertionError):
    """The model does not allow what took effect."""


def require(condition: object, fault: str) -> None:
    """Raise `Faulty` unless `condition` holds."""
    if not condition:
        raise Faulty(fault)


class _Progress:
    """The progress of a request: when each operation got its outcome, as the number of the commit, counted from 1."""

    def __init__(self, plan: Plan, refused: Mapping[int, Reason]) -> None:
        self.refused = refused
        self.interleaved = {index for unit in plan.interleaved(refused) for index in unit.members}
        self.plan = plan.without(unit for unit in plan.units if unit.members[0] in self.interleaved)
        self.unit_of = {index: unit for unit in self.plan.units for index in unit.members}
        self.resolved: dict[int, int] = {}
        self.applied: set[int] = set()

    def next_on(self, key: Key, count: int) -> list[int]:
        """Return the indexes of the first `count` operations on `key` that have no outcome yet."""
        waiting = sorted(i for i in self.unit_of if self.plan.key(i) == key and i not in self.resolved)
        require(len(waiting) >= count, f"{key}: applied more often than there are operations")
        return waiting[:count]

    def resolve(self, index: int, now: int) -> None:
        """Record that an operation got its outcome."""
        require(index not in self.resolved and index not in self.plan.early, f"operation {index} has two outcomes")
        self.resolved[index] = now

    def since(self, unit: Unit) -> int:
        """Return the number of the commit after which all units before `unit` had their outcomes."""
        before = [index for other in self.plan.before[unit] for index in other.members]
        require(all(index in self.resolved for index in before), f"{unit} went before what is before it on its keys")
        return max((self.resolved[index] for index in before), default=0)

    def outcomes(self) -> Outcomes:
        """Return the outcome of each operation that was sent."""
        return {index: None if index in self.applied else self.refused[index] for index in self.resolved}


class History:
    """Replays commits on the model; raises `Faulty` at the first that the model does not allow."""

    def __init__(
        self, requests: Mapping[str, Sequence[OperationInput]], commits: Sequence[Commit], rules: Rules
    ) -> None:
        self._rules = rules
        self._known: dict[Key, list[tuple[int, Known | None]]] = defaultdict(lambda: [(0, None)])
        refused: dict[str, dict[int, Reason]] = {request_id: {} for request_id in requests}
        receipts: set[tuple[str, int, int]] = set()
        for commit in commits:
            receipt = commit.request_id, commit.lane, commit.number
            require(receipt not in receipts, f"transaction {receipt} took effect twice")
            receipts.add(receipt)
            twice = refused[commit.request_id].keys() & commit.refused.keys()
            require(not twice, f"operations {twice} are refused by two receipts")
            refused[commit.request_id] |= commit.refused
        self._progress = {
            request_id: _Progress(Plan.of(sources, rules), refused[request_id])
            for request_id, sources in requests.items()
        }
        for now, commit in enumerate(commits, 1):
            self._replay(commit, now)

    @property
    def states(self) -> States:
        """The model's records after the last commit."""
        return {key: line[-1][1] for key, line in self._known.items() if line[-1][1] is not None}

    def outcomes(self, request_id: str) -> Outcomes:
        """Return the outcome of each operation that was sent; raises `Faulty` if one has none."""
        progress = self._progress[request_id]
        missing = progress.plan.operations.keys() - progress.resolved.keys() - progress.plan.early.keys()
        require(not missing, f"{request_id}: operations {missing} have no outcome")
        return progress.outcomes()

    def _replay(self, commit: Commit, now: int) -> None:
        progress = self._progress[commit.request_id]
        for index in commit.refused:
            progress.resolve(index, now)
        for unit in {progress.unit_of[index] for index in commit.refused if index in progress.unit_of}:
            self._check_refusal(progress, unit, commit, now)
        applied = [index for key, count in Counter(commit.keys).items() for index in progress.next_on(key, count)]
        for unit in dict.fromkeys(progress.unit_of[index] for index in applied):
            require(set(unit.members) <= set(applied), f"{unit} applied in part")
            progress.since(unit)
            for index in unit.members:
                self._apply(progress, index, now)
        for key, record in commit.records.items():
            known = self._known[key][-1][1]
            require(record == known, f"{commit}: {key} is {record}, not {known}")

    def _apply(self, progress: _Progress, index: int, now: int) -> None:
        operation, key = progress.plan.operations[index], progress.plan.key(index)
        known = self._known[key][-1][1]
        why = self._rules.reasons(operation, known)
        require(not why, f"operation {index} ({operation}) applied to {known}, which refuses it: {set(why)}")
        progress.resolve(index, now)
        progress.applied.add(index)
        self._known[key].append((now, effect(operation, known)))

    def _check_refusal(self, progress: _Progress, unit: Unit, commit: Commit, now: int) -> None:
        require(set(unit.members) <= commit.refused.keys(), f"{unit} was refused in part")
        since = progress.since(unit)
        reasons = {index: commit.refused[index] for index in unit.members}
        own = [index for index, reason in reasons.items() if reason is not Reason.GROUP_REFUSED]
        require(own, f"{unit} was refused, and none of it has a reason of its own")
        for index in own:
            operation, line = progress.plan.operations[index], self._known[progress.plan.key(index)]
            first = max(position for position, (when, _) in enumerate(line) if when <= since)
            held = [known for _, known in line[first:]]
            right = any(reasons[index] in self._rules.reasons(operation, known) for known in held)
            require(right, f"operation {index} ({operation}) was refused as {reasons[index]} by {held} at {now}")


def check_prediction(plan: Plan, legal: Mapping[int, frozenset[Reason]], found: Outcomes) -> None:
    """Raise unless `found` is what the model predicts for a request that no other request interrupted."""
    require(found.keys() == legal.keys(), f"outcomes of {sorted(found)}, not of {sorted(legal)}")
    for index, reason in found.items():
        right = reason in legal[index] if reason else legal[index] == APPLIED
        require(right, f"operation {index}: {reason or 'applied'}, expected {set(legal[index]) or 'applied'}")
    for unit in plan.units:
        refused = {found[index] for index in unit.members} - {None}
        require(refused != {Reason.GROUP_REFUSED}, f"{unit} was refused, and none of it has a reason of its own")
