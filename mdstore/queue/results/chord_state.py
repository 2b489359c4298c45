"""The set-based join: which parts of a chord have returned, and whether all have.

A join is a root item and shards of 200 indexes each. A shard holds two sets that only grow, of the parts that succeeded and of
those that failed; a part that is in both did succeed. So a part may be noted any number of times, in any order. The part
that fills a shard notes the shard in the root, and the one that fills the root completes the join: one call a part, and
three more a shard. Every later note of a part reads the root as well, so whatever died on its way is found.

    id = chord-join-{join}        size        parts, once all but the last are published
                                  added       ids of parts that were added later (SS)
                                  seen        numbers of shards that are there, but for the first (NS)
                                  full, clean numbers of shards whose parts all returned; whose parts all succeeded (NS)
                                  taken, taken_unclean  the part that found the join complete, and its parts all to have
                                              succeeded or not, and publishes its callback
                                  uneven      true: indexes are not those from 0 to size - 1, each once
                                  fired       success | failure: the callback was published, or failed
                                  open, look_at   shard and key of the index of joins that were not fired: when one is to be
                                                  looked at, since perhaps its last part's worker died
                                  opened_at
                                  at          when it was last written; ttl; what `open` was given
    id = chord-join-{join}#{n}    ok, failed  parts whose index is n * 200 ... (BS)
                                  expected    how many, of the last shard
                                  in_root     true: the root has seen the shard
                                  uneven      true, once the join is known to be uneven
                                  at; ttl

Indexes are Celery's `group_index`, which is neither unique nor without gaps where groups end up inside other canvases. What is
counted are tasks' ids; the index only deals them to shards. Where two ids of one index turn up, or an index that is not below
the size, each note from then on counts all shards (an uneven join): whoever finds that out marks the shards first and counts
afterwards, so a part that was noted without seeing the mark is counted by the one who made it. Several may find a join
complete at the same time, and the first of them takes it. Times are Unix seconds.
"""

from __future__ import annotations

import base64
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mdstore.aws.dynamodb.attributes import Item, from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.errors import ConditionFailed
from mdstore.model import OPEN_INDEX
from mdstore.queue.results.shard import SHARD, Part, Shard

Outcome = Literal["success", "failure"]

_OPEN_SHARDS = 8  # so that the index does not funnel all joins through one of its partitions
_IN_FLIGHT = 8
#: Seconds until an open join is looked at. Later looks are as far apart, or a quarter of its age if that is more.
_LOOK = 60
_TRUE: dict[str, Any] = {"BOOL": True}
_EXISTS = "attribute_exists(id)"
_FIRST_SIZE = f"{_EXISTS} AND (attribute_not_exists(#size) OR #size = :size)"
_LARGER_SIZE = f"{_EXISTS} AND #size < :size"
_UNDISPATCHED = f"{_EXISTS} AND (attribute_not_exists(#fired) OR #fired <> :success)"
_UNCLAIMED = f"{_UNDISPATCHED} AND (attribute_not_exists(#taken) OR #taken = :part)"
_UNCLAIMED_UNCLEAN = (
    f"{_EXISTS} AND attribute_not_exists(#fired) AND (attribute_not_exists(#taken_unclean) OR #taken_unclean = :part)"
)
_NAMED = re.compile(r"#(\w+)")  # DynamoDB reserves many words


@dataclass(frozen=True, kw_only=True)
class ChordState:
    """How far a join is. `clean`: all parts did succeed. `given` is what `open` was given."""

    complete: bool = False
    clean: bool = False
    size: int = 0
    dispatched: Outcome | None = None
    at: float = 0.0
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The parts that returned, in the order of their indexes; a part that failed and succeeded did succeed."""

    succeeded: Sequence[Part]
    failed: Sequence[Part]

    @property
    def parts(self) -> list[Part]:
        """Both."""
        return sorted([*self.succeeded, *self.failed])


class ChordStates:
    """Joins in one table. Raises `Unavailable` and `DeploymentBroken`. `retention` is how long a join is kept, in seconds."""

    def __init__(
        self,
        *,
        dynamo: DynamoClient,
        table: str,
        retention: int,
        clock: Callable[[], float] = time.time,
        shard: int = SHARD,
    ) -> None:
        self._dynamo = dynamo
        self._table = table
        self._retention = retention
        self._clock = clock
        self._shard = shard

    def open(self, chord_id: str, **given: Any) -> None:
        """Begin a join before any of its parts is published; one that is there stays as it is."""
        now = self._clock()
        item = to_item(
            {
                **given,
                "id": _root(chord_id),
                "open": str(zlib.crc32(chord_id.encode()) % _OPEN_SHARDS),
                "look_at": int(now) + _LOOK,
                "opened_at": int(now),
                "at": int(now),
                "ttl": int(now) + self._retention,
            }
        )
        body = {"TableName": self._table, "Item": item, "ConditionExpression": "attribute_not_exists(id)"}
        try:
            self._dynamo.call("PutItem", body)
        except ConditionFailed:
            return

    def resize(self, chord_id: str, size: int) -> None:
        """Say how many parts there are; to be said before the last is published. Nothing where there is no such join.

        The most that was said holds: Celery 5.6 also says the size of a group inside of the header, with the header's id. The
        shard that was the last until then expects too few, so such a join is counted as an uneven one.
        """
        values: Item = {":size": {"N": str(size)}}
        grown = {**values, ":true": _TRUE}
        root = self._update_if(_FIRST_SIZE, _root(chord_id), "SET #size = :size", values) or self._update_if(
            _LARGER_SIZE, _root(chord_id), "SET #size = :size, #uneven = :true", grown
        )
        if root is None:
            return
        if "uneven" in root or self._count(root) > self._shards(size):
            self._mark(chord_id)
            return
        last = self._shards(size) - 1
        expected = size - last * self._shard
        item = self._update(_shard(chord_id, last), "SET #expected = :expected", {":expected": {"N": str(expected)}})
        shard = Shard.read(item, size=expected)
        if shard.last >= size:
            self._mark(chord_id)
        elif len(shard.parts) >= expected:  # its parts were published and returned before another shard's last one
            self._note_full(chord_id, last, clean=shard.is_clean)

    def extend(self, chord_id: str, part: str) -> None:
        """Add a part to a join that is not complete: a task's id."""
        self._update(_root(chord_id), "ADD #added :part", {":part": {"SS": [part]}}, condition=_EXISTS)

    def record_part(self, chord_id: str, part: Part, *, ok: bool) -> ChordState:
        """Note that a part returned; says how far the join is. Raises `ConditionFailed` where the join is gone."""
        number, place = divmod(part.index, self._shard)
        packed = {"BS": [base64.b64encode(part.pack()).decode()]}
        item = self._update(_shard(chord_id, number), f"ADD #{'ok' if ok else 'failed'} :part", {":part": packed})
        shard = Shard.read(item, size=self._shard)
        is_new = number > 0 and not shard.in_root
        if not shard.irregular and (
            shard.has_duplicate_indexes or place >= shard.expected or (is_new and self._is_beyond(chord_id, number))
        ):
            self._mark(chord_id, number)
        elif not shard.irregular:
            if len(shard.parts) < shard.expected:
                return ChordState()
            root = self._note_full(chord_id, number, clean=shard.is_clean)
            if "uneven" not in root and "added" not in root:
                shards = self._shards(_size(root))
                full, clean_ones = (len(root.get(name, {"NS": []})["NS"]) for name in ("full", "clean"))
                found = _join(root, complete=0 < shards <= full, clean=shards <= clean_ones)
                return self._claim(chord_id, part, found)
        return self._claim(chord_id, part, self.counted(chord_id))

    def counted(self, chord_id: str) -> ChordState:
        """How far a join is, by all its shards, whether they were noted in the root or not."""
        root, *items = self._items(chord_id)
        shard, size = _together(items), _size(root)
        expected = size + len(root.get("added", {"SS": []})["SS"])
        return _join(root, complete=size > 0 and expected <= len(shard.parts), clean=shard.is_clean, at=shard.at)

    def returned(self, chord_id: str) -> Returned:
        """Which parts returned."""
        shard = _together(self._items(chord_id)[1:])
        failed = shard.failed - shard.ok
        return Returned(
            succeeded=sorted(map(Part.unpack, shard.ok)),
            failed=sorted(map(Part.unpack, failed)),
        )

    def mark_dispatched(self, chord_id: str, outcome: Outcome) -> None:
        """Note that the callback was published; a success stays."""
        values = to_item({":outcome": outcome, ":success": "success"})
        self._update_if(_UNDISPATCHED, _root(chord_id), "SET #fired = :outcome REMOVE #open", values)

    def undispatched(self, now: float) -> Iterator[str]:
        """Joins that are not fired and are to be looked at, as far as the index knows."""
        for number in range(_OPEN_SHARDS):
            body: dict[str, Any] = {
                "TableName": self._table,
                "IndexName": OPEN_INDEX,
                "KeyConditionExpression": "#open = :open AND #look_at <= :now",
                "ExpressionAttributeNames": {"#open": "open", "#look_at": "look_at"},
                "ExpressionAttributeValues": to_item({":open": str(number), ":now": int(now)}),
            }
            while body:
                answer = self._dynamo.call("Query", body)
                yield from (item["id"]["S"].removeprefix(_root("")) for item in answer["Items"])
                after = answer.get("LastEvaluatedKey")
                body = {**body, "ExclusiveStartKey": after} if after else {}

    def read(self, chord_id: str, now: float) -> ChordState | None:
        """How far a join is, and put off the next look at it; None where another process looks, or it is fired or gone."""
        key = to_item({"id": _root(chord_id)})
        answer = self._dynamo.call("GetItem", {"TableName": self._table, "Key": key, "ConsistentRead": True})
        root: Item = answer.get("Item", {})
        seen, opened = (int(root.get(name, {"N": "0"})["N"]) for name in ("look_at", "opened_at"))
        if "open" not in root or seen > now:
            return None
        following = int(now) + max(_LOOK, (int(now) - opened) // 4)
        body: dict[str, Any] = {
            "TableName": self._table,
            "Key": key,
            "UpdateExpression": "SET #look_at = :following",  # and not its end: a join whose parts are lost ends
            "ConditionExpression": "attribute_exists(#open) AND #look_at = :seen",
            "ExpressionAttributeNames": {"#open": "open", "#look_at": "look_at"},
            "ExpressionAttributeValues": to_item({":following": following, ":seen": seen}),
        }
        try:
            self._dynamo.call("UpdateItem", body)
        except ConditionFailed:
            return None
        return self.counted(chord_id)

    # -- items

    def _is_beyond(self, chord_id: str, number: int) -> bool:
        """Let the root see a shard; returns whether the join's size leaves no room for it."""
        root = self._update(_root(chord_id), "ADD #seen :shard", {":shard": {"NS": [str(number)]}}, condition=_EXISTS)
        if 0 < self._shards(_size(root)) <= number:
            return True
        self._update(_shard(chord_id, number), "SET #in_root = :true", {":true": _TRUE})
        return False

    def _note_full(self, chord_id: str, number: int, *, clean: bool) -> Item:
        """Note in the root that a shard is full; returns the root."""
        sets = "ADD #full :shard, #clean :shard" if clean else "ADD #full :shard"
        values: Item = {":look_at": self._soon(), ":shard": {"NS": [str(number)]}}
        return self._update(_root(chord_id), f"SET #look_at = :look_at {sets}", values, condition=_EXISTS)

    def _claim(self, chord_id: str, part: Part, found: ChordState) -> ChordState:
        """How far a join is for `part`. Until it has fired, it is complete only for the part that finds it so first.

        Who finds that all parts did succeed takes it from who found, or fired, that one had not.
        """
        if not found.complete or found.dispatched == "success" or (found.dispatched and not found.clean):
            return found
        values: Item = {":look_at": self._soon(), ":part": {"S": part.id}}
        if found.clean:
            values[":success"] = {"S": "success"}
        name, condition = ("taken", _UNCLAIMED) if found.clean else ("taken_unclean", _UNCLAIMED_UNCLEAN)
        root = self._update_if(condition, _root(chord_id), f"SET #look_at = :look_at, #{name} = :part", values)
        return found if root else ChordState()

    def _soon(self) -> dict[str, Any]:
        """When to look at a join that may be complete: who completed it may die before the callback is published."""
        return {"N": str(int(self._clock()) + _LOOK)}

    def _mark(self, chord_id: str, found_in: int = 0) -> None:
        """Have each note from now on count all shards; the one that tells it last, so that it tells it again after a death."""
        root = self._update(_root(chord_id), "SET #uneven = :true", {":true": _TRUE}, condition=_EXISTS)
        for number in sorted(range(self._count(root)), key=found_in.__eq__):
            self._update(_shard(chord_id, number), "SET #uneven = :true", {":true": _TRUE})

    def _items(self, chord_id: str) -> list[Item]:
        """The root and the shards, empty where they are not there, strongly consistent."""
        (root,) = self._get([_root(chord_id)])
        while True:
            count = self._count(root)
            root, *shards = self._get([_root(chord_id), *(_shard(chord_id, number) for number in range(count))])
            if self._count(root) == count:
                return [root, *shards]

    def _get(self, ids: list[str]) -> list[Item]:
        batches = [ids[start : start + 100] for start in range(0, len(ids), 100)]
        tasks = (self._dynamo.batch_get(self._table, [to_item({"id": one}) for one in batch]) for batch in batches)
        found = {item["id"]["S"]: item for items in self._dynamo.run(tasks, in_flight=_IN_FLIGHT) for item in items}
        return [found.get(one, {}) for one in ids]

    def _update(self, key: str, change: str, values: Item, *, condition: str = "") -> Item:
        """Change an item, and put off its end; returns it as it is then."""
        now = int(self._clock())
        times = "SET #at = :at, #ttl = :ttl"
        expression = f"{times}, {change[4:]}" if change.startswith("SET ") else f"{times} {change}"
        body: dict[str, Any] = {
            "TableName": self._table,
            "Key": to_item({"id": key}),
            "UpdateExpression": expression,
            "ExpressionAttributeNames": {f"#{name}": name for name in _NAMED.findall(f"{expression} {condition}")},
            "ExpressionAttributeValues": {**values, ":at": {"N": str(now)}, ":ttl": {"N": str(now + self._retention)}},
            "ReturnValues": "ALL_NEW",
        }
        if condition:
            body["ConditionExpression"] = condition
        item: Item = self._dynamo.call("UpdateItem", body)["Attributes"]
        return item

    def _update_if(self, condition: str, key: str, change: str, values: Item) -> Item | None:
        """The same, or None where the condition is not met."""
        try:
            return self._update(key, change, values, condition=condition)
        except ConditionFailed:
            return None

    def _shards(self, size: int) -> int:
        return -(-size // self._shard)

    def _count(self, root: Item) -> int:
        """How many shards there are, or will be."""
        return max(self._shards(_size(root)), *(int(number) + 1 for number in root.get("seen", {"NS": ["0"]})["NS"]))


def _root(chord_id: str) -> str:
    return f"chord-join-{chord_id}"


def _size(root: Item) -> int:
    return int(root.get("size", {"N": "0"})["N"])


def _shard(chord_id: str, number: int) -> str:
    return f"{_root(chord_id)}#{number}"


def _together(items: Sequence[Item]) -> Shard:
    shards = [Shard.read(item, size=0) for item in items]
    return Shard(
        ok=frozenset().union(*(shard.ok for shard in shards)),
        failed=frozenset().union(*(shard.failed for shard in shards)),
        at=max((shard.at for shard in shards), default=0.0),
    )


_OWN = frozenset(
    {
        "id", "size", "added", "seen", "full", "clean", "uneven", "taken", "taken_unclean", "fired", "open", "look_at",
        "opened_at", "at", "ttl",
    }
)  # fmt: skip


def _join(root: Item, *, complete: bool, clean: bool, at: float = 0.0) -> ChordState:
    known = from_item({name: value for name, value in root.items() if name not in ("added", "seen", "full", "clean")})
    return ChordState(
        complete=complete,
        clean=clean,
        size=known.get("size", 0),
        dispatched=known.get("fired"),
        at=max(at, float(known.get("at", 0))),
        given={name: value for name, value in known.items() if name not in _OWN},
    )
