"""Packing: divides a lane into transactions. It runs in the worker.

The same operations give the same transactions with the same numbers in every process. Receipts depend on that.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mdstore.model import Reason, Refusal
from mdstore.store import folding
from mdstore.store.folding import Fold
from mdstore.store.operations import Indexed

#: Operations per transaction: DynamoDB allows 100 actions, and one of them writes the receipt.
MAX_ACTIONS = 99
#: Bytes of data in JSON per transaction. DynamoDB allows 4 MB, but more than 1 MB would take 2,000 write units at once, which a
#: new table does not have.
MAX_TRANSACTION_BYTES = 2**20
#: The first schema version whose operations are folded. A receipt names its transaction by number, so the payloads of earlier
#: versions are packed as they always were.
FIRST_FOLDED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Transaction:
    """The content of one `TransactWriteItems` call: its number in the lane, and its operations.

    Each operation is on a different key, unless `is_folded`: then some keys have a fold of operations, which one action
    applies. `refused` holds operations that packing refused. Their outcome is stored in this transaction's receipt.
    """

    number: int
    operations: tuple[Indexed, ...]
    refused: tuple[Refusal, ...] = ()
    is_folded: bool = False


Unit = list[Indexed]  # operations that apply together: all of a group, or a fold


def pack(operations: Sequence[Indexed], v: int) -> list[list[Transaction]]:
    """Pack a lane of a payload of schema version `v` into waves of transactions.

    Waves run one after the other, and the transactions of a wave in parallel. Each key has at most one operation per wave, or
    one fold (from version 2 on), so operations on one key run in the order of the waves. Groups that interleave on their keys
    cannot all be both atomic and in order: all but the first of them are refused as invalid.
    """
    waves, interleaved = _waves(operations, fold=v >= FIRST_FOLDED)
    packed: list[list[Transaction]] = []
    number = 0
    for wave in waves:
        packed.append([])
        for chosen, is_folded in _split(wave):
            packed[-1].append(Transaction(number=number, operations=chosen, is_folded=is_folded))
            number += 1
    for start in range(0, len(interleaved), MAX_ACTIONS):
        refused = tuple(_interleaved(item) for item in interleaved[start : start + MAX_ACTIONS])
        packed.append([Transaction(number=number, operations=(), refused=refused)])
        number += 1
    return packed


def _waves(operations: Sequence[Indexed], *, fold: bool) -> tuple[list[list[Unit]], list[Indexed]]:
    """Return the waves, and the operations of groups that have to be refused."""
    if any(item.group is not None for item in operations):
        return _schedule(_units(operations, fold=fold))
    # Without groups, the wave of a fold is the number of earlier folds on its key.
    waves: list[list[Unit]] = []
    latest: dict[tuple[str, str], Fold] = {}
    numbers: dict[tuple[str, str], int] = {}  # of the waves of the latest folds, except 0
    for item in operations:
        key = item.entity, item.key
        number = 0
        found = latest.get(key)
        if found is not None:
            if fold and _takes(found, item):
                found.append(item)
                continue
            numbers[key] = number = numbers.get(key, 0) + 1
        if number == len(waves):
            waves.append([])
        latest[key] = found = [item]
        waves[number].append(found)
    return waves, []


def _takes(fold: Fold, item: Indexed) -> bool:
    """Return whether the next operation on a fold's key can be added to the fold."""
    return folding.joins(item, fold[-1]) and (len(fold) + 1) * folding.refusal_bytes(item) <= folding.MAX_REFUSAL_BYTES


def _units(operations: Sequence[Indexed], *, fold: bool) -> list[Unit]:
    units: list[Unit] = []
    groups: dict[str, Unit] = {}
    latest: dict[tuple[str, str], Unit] = {}
    for item in operations:
        key = item.entity, item.key
        group = item.group
        unit = latest.get(key) if group is None else groups.get(group)
        if unit is None or (group is None and not (fold and _takes(unit, item))):
            unit = []
            units.append(unit)
            if group is not None:
                groups[group] = unit
        unit.append(item)
        latest[key] = unit
    return units


def _schedule(units: list[Unit]) -> tuple[list[list[Unit]], list[Indexed]]:
    """Return the waves, and the operations of groups that have to be refused.

    Each unit goes to the first wave after those of all units that precede it on any of its keys (a topological order). Units
    that precede each other in a cycle have no such order: of each strongly connected component, the first group stays and the
    other groups are refused. That breaks every cycle, because a cycle needs two groups.
    """
    predecessors, successors = _dependencies(units)
    refused: set[int] = set()
    for component in _strongly_connected_components(predecessors, successors):
        groups = [number for number in component if units[number][0].group is not None]
        refused.update(groups[1:])
    if refused:
        kept = [unit for number, unit in enumerate(units) if number not in refused]
        return _schedule(kept)[0], [item for number in sorted(refused) for item in units[number]]
    unscheduled = [len(numbers) for numbers in predecessors]
    ready = [number for number, count in enumerate(unscheduled) if not count]
    wave_of = [0] * len(units)
    waves: list[list[Unit]] = []
    while ready:
        number = heapq.heappop(ready)  # take the earliest in the request first
        if wave_of[number] == len(waves):
            waves.append([])
        waves[wave_of[number]].append(units[number])
        for successor in successors[number]:
            wave_of[successor] = max(wave_of[successor], wave_of[number] + 1)
            unscheduled[successor] -= 1
            if not unscheduled[successor]:
                heapq.heappush(ready, successor)
    return waves, []


def _dependencies(units: list[Unit]) -> tuple[list[set[int]], list[set[int]]]:
    """Return, for each unit, its direct predecessors and its direct successors on any of its keys."""
    queues: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for number, unit in enumerate(units):
        for item in unit:
            queues[item.entity, item.key].append((item.index, number))
    predecessors: list[set[int]] = [set() for _ in units]
    successors: list[set[int]] = [set() for _ in units]
    for queue in queues.values():
        queue.sort()
        for (_, first), (_, second) in pairwise(queue):
            if first != second:
                predecessors[second].add(first)
                successors[first].add(second)
    return predecessors, successors


def _strongly_connected_components(predecessors: list[set[int]], successors: list[set[int]]) -> list[list[int]]:
    """Return the strongly connected components of more than one unit, each sorted: the units that lie on cycles.

    Remove units that are on no cycle first, from both ends; of most lanes, nothing remains. Then run Kosaraju's algorithm,
    without recursion.
    """
    remaining = _strip_acyclic(range(len(predecessors)), predecessors, successors)
    remaining = _strip_acyclic(remaining, successors, predecessors)
    finished: list[int] = []
    seen: set[int] = set()
    for start in sorted(remaining):
        finished += _postorder(start, successors, remaining, seen)
    components: list[list[int]] = []
    seen = set()
    for start in reversed(finished):
        component = _postorder(start, predecessors, remaining, seen)
        if len(component) > 1:
            components.append(sorted(component))
    return components


def _strip_acyclic(units: Iterable[int], predecessors: list[set[int]], successors: list[set[int]]) -> set[int]:
    """Return `units` after removing, again and again, every unit that has no predecessor among the remaining ones."""
    remaining = set(units)
    in_degrees = {number: len(predecessors[number] & remaining) for number in remaining}
    ready = [number for number, count in in_degrees.items() if not count]
    while ready:
        number = ready.pop()
        remaining.discard(number)
        for successor in successors[number] & remaining:
            in_degrees[successor] -= 1
            if not in_degrees[successor]:
                ready.append(successor)
    return remaining


def _postorder(start: int, edges: list[set[int]], within: set[int], seen: set[int]) -> list[int]:
    """Return the units that a depth-first search from `start` reaches and that are not `seen` yet, in postorder."""
    if start in seen:
        return []
    seen.add(start)
    found: list[int] = []
    path = [(start, iter(sorted(edges[start] & within)))]
    while path:
        number, neighbours = path[-1]
        unseen = next((one for one in neighbours if one not in seen), None)
        if unseen is None:
            found.append(number)
            path.pop()
        else:
            seen.add(unseen)
            path.append((unseen, iter(sorted(edges[unseen] & within))))
    return found


def _split(wave: list[Unit]) -> Iterator[tuple[tuple[Indexed, ...], bool]]:
    """Split a wave into the operations of its transactions, within the limits and without dividing a unit.

    With each, say whether some of its operations are a fold.
    """
    if len(wave) == 1:  # a long lane has thousands of these
        yield tuple(wave[0]), len(wave[0]) > 1 and wave[0][0].group is None
        return
    chosen: list[Indexed] = []
    actions = size = refusals = 0
    for unit in wave:
        first = unit[0]
        unit_actions, unit_size, unit_refusals = 1, first.size, 0
        if len(unit) > 1:
            if first.group is None:
                unit_size, unit_refusals = unit[-1].size, len(unit) * folding.refusal_bytes(first)
            else:
                unit_actions, unit_size = len(unit), sum(item.size for item in unit)
        if chosen and (
            actions + unit_actions > MAX_ACTIONS
            or size + unit_size > MAX_TRANSACTION_BYTES
            or (unit_refusals and refusals + unit_refusals > folding.MAX_REFUSAL_BYTES)
        ):
            yield tuple(chosen), refusals > 0
            chosen, actions, size, refusals = [], 0, 0, 0
        chosen += unit
        actions += unit_actions
        size += unit_size
        refusals += unit_refusals
    yield tuple(chosen), refusals > 0


def _interleaved(item: Indexed) -> Refusal:
    return refusal(
        item, Reason.INVALID, "group: groups interleave on their keys, so they cannot be both atomic and in order"
    )


def refusal(item: Indexed, reason: Reason, detail: str = "") -> Refusal:
    """Build the refusal of one operation."""
    return Refusal(index=item.index, reason=reason, detail=detail[:500], op=item.op, entity=item.entity, key=item.key)
