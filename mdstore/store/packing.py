"""Packing: which transactions a lane becomes. It runs at the worker.

The same operations give the same transactions with the same numbers, in whatever process: that is what makes receipts work.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mdstore.model import Reason, Refusal
from mdstore.store.operations import Indexed

#: Of DynamoDB's 100 actions a transaction, one is the receipt's.
MAX_ACTIONS = 99
#: Of a transaction's 4 MB, in JSON; more would take 2,000 write units at once, which a young table does not have.
MAX_TRANSACTION_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Transaction:
    """One `TransactWriteItems` call to be: its number in the lane, and its operations, no two on one key.

    `refused` holds operations that the plan itself refuses; they get their outcome from this transaction's receipt.
    """

    number: int
    operations: tuple[Indexed, ...]
    refused: tuple[Refusal, ...] = ()


Unit = list[Indexed]  # what applies together: a group's operations, or a single one


def pack(operations: Sequence[Indexed]) -> list[list[Transaction]]:
    """Pack a lane into waves of transactions.

    Waves run one after the other, the transactions of a wave in parallel. Within a wave each key occurs once, so the order
    per key is the order of the waves. Groups that interleave on their keys cannot all be atomic and in order: one of
    them is refused as invalid.
    """
    waves, interleaved = _waves(operations)
    packed: list[list[Transaction]] = []
    number = 0
    for wave in waves:
        packed.append([])
        for chosen in _fill(wave):
            packed[-1].append(Transaction(number=number, operations=chosen))
            number += 1
    for start in range(0, len(interleaved), MAX_ACTIONS):
        refused = tuple(_interleaved(item) for item in interleaved[start : start + MAX_ACTIONS])
        packed.append([Transaction(number=number, operations=(), refused=refused)])
        number += 1
    return packed


def _waves(operations: Sequence[Indexed]) -> tuple[list[list[Unit]], list[Indexed]]:
    """The waves, and the operations of groups that had to be refused."""
    if any(item.group is not None for item in operations):
        return _schedule(_units(operations))
    # Without groups an operation's wave is the number of operations before it on its key.
    waves: list[list[Unit]] = []
    seen: dict[tuple[str, str], int] = {}
    for item in operations:
        key = item.entity, item.key
        number = seen.get(key, 0)
        seen[key] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append([item])
    return waves, []


def _units(operations: Sequence[Indexed]) -> list[Unit]:
    units: list[Unit] = []
    groups: dict[str, Unit] = {}
    for item in operations:
        group = item.group
        if group is not None and group in groups:
            groups[group].append(item)
            continue
        units.append([item])
        if group is not None:
            groups[group] = units[-1]
    return units


def _schedule(units: list[Unit]) -> tuple[list[list[Unit]], list[Indexed]]:
    """The waves, and the operations of groups that had to be refused.

    Each unit's wave is one after the last wave of the units before it on any of its keys. Where units wait for each other
    in a circle, the first group of each knot of circles stays and its others are refused: a circle needs two groups.
    """
    before, after = _order(units)
    refused: set[int] = set()
    for knot in _knots(before, after):
        groups = [number for number in knot if units[number][0].group is not None]
        refused.update(groups[1:])
    if refused:
        kept = [unit for number, unit in enumerate(units) if number not in refused]
        return _schedule(kept)[0], [item for number in sorted(refused) for item in units[number]]
    waiting = [len(numbers) for numbers in before]
    ready = [number for number, count in enumerate(waiting) if not count]
    wave_of = [0] * len(units)
    waves: list[list[Unit]] = []
    while ready:
        number = heapq.heappop(ready)  # the first in the request first
        if wave_of[number] == len(waves):
            waves.append([])
        waves[wave_of[number]].append(units[number])
        for follower in after[number]:
            wave_of[follower] = max(wave_of[follower], wave_of[number] + 1)
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, follower)
    return waves, []


def _order(units: list[Unit]) -> tuple[list[set[int]], list[set[int]]]:
    """For each unit, the units that come right before and right after it on one of its keys."""
    queues: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for number, unit in enumerate(units):
        for item in unit:
            queues[item.entity, item.key].append((item.index, number))
    before: list[set[int]] = [set() for _ in units]
    after: list[set[int]] = [set() for _ in units]
    for queue in queues.values():
        queue.sort()
        for (_, first), (_, second) in pairwise(queue):
            if first != second:
                before[second].add(first)
                after[first].add(second)
    return before, after


def _knots(before: list[set[int]], after: list[set[int]]) -> list[list[int]]:
    """Strongly connected components of more than one unit, each in order: what waits for itself, over whatever way.

    Units that are not on any circle are peeled off first, from both ends, so the usual lane ends there. Then Kosaraju's
    two walks, without recursion.
    """
    left = _peeled(range(len(before)), before, after)
    left = _peeled(left, after, before)
    finished: list[int] = []
    seen: set[int] = set()
    for start in sorted(left):
        finished += _walk(start, after, left, seen)
    knots: list[list[int]] = []
    seen = set()
    for start in reversed(finished):
        knot = _walk(start, before, left, seen)
        if len(knot) > 1:
            knots.append(sorted(knot))
    return knots


def _peeled(units: Iterable[int], before: list[set[int]], after: list[set[int]]) -> set[int]:
    """`units` without those that wait for none of them, and without those that then wait for none, and so on."""
    left = set(units)
    waiting = {number: len(before[number] & left) for number in left}
    ready = [number for number, count in waiting.items() if not count]
    while ready:
        number = ready.pop()
        left.discard(number)
        for follower in after[number] & left:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return left


def _walk(start: int, edges: list[set[int]], within: set[int], seen: set[int]) -> list[int]:
    """What can be reached from `start` and was not seen before, in the order in which it is left again."""
    if start in seen:
        return []
    seen.add(start)
    left: list[int] = []
    path = [(start, iter(sorted(edges[start] & within)))]
    while path:
        number, following = path[-1]
        step = next((one for one in following if one not in seen), None)
        if step is None:
            left.append(number)
            path.pop()
        else:
            seen.add(step)
            path.append((step, iter(sorted(edges[step] & within))))
    return left


def _fill(wave: list[Unit]) -> Iterator[tuple[Indexed, ...]]:
    chosen: list[Indexed] = []
    size = 0
    for unit in wave:
        more = unit[0].size if len(unit) == 1 else sum(item.size for item in unit)
        if chosen and (len(chosen) + len(unit) > MAX_ACTIONS or size + more > MAX_TRANSACTION_BYTES):
            yield tuple(chosen)
            chosen, size = [], 0
        chosen += unit
        size += more
    yield tuple(chosen)


def _interleaved(item: Indexed) -> Refusal:
    return refusal(
        item, Reason.INVALID, "group: groups interleave on their keys, so they cannot be both atomic and in order"
    )


def refusal(item: Indexed, reason: Reason, detail: str = "") -> Refusal:
    """The refusal of one operation."""
    return Refusal(index=item.index, reason=reason, detail=detail[:500], op=item.op, entity=item.entity, key=item.key)
