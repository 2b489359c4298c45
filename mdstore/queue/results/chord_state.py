"""The state of a chord: which of its parts have returned, and whether all have.

A chord has a root item, and shards of 200 indexes each. A shard holds two sets that only grow: the parts that succeeded, and
those that failed; a part in both did succeed. So a part may be recorded any number of times, in any order. The part that
fills a shard records the shard in the root, and the part that fills the root completes the chord: one call a part, and three
more a shard. Every later record of a part reads the root as well, so whatever died half-way is found.

    id = chord-join-{chord}       size        parts, once all but the last are published
                                  added       ids of parts that were added later (SS)
                                  seen        numbers of the shards that exist, except the first (NS)
                                  full, clean numbers of the shards whose parts all returned; whose parts all succeeded (NS)
                                  taken, taken_unclean  the part that claimed the complete chord, all of its parts having
                                              succeeded or not: it dispatches the callback
                                  uneven      true: the chord is irregular: its indexes are not 0 to size - 1, each once
                                  fired       success | failure: the callback was dispatched, or could not be
                                  open, look_at   shard and key of the index of chords without a dispatched callback: when to
                                                  look at one, in case its last part's worker died
                                  opened_at
                                  at          when it was last written; ttl; what `open` was given
    id = chord-join-{chord}#{n}   ok, failed  parts whose index is n * 200 ... (BS)
                                  expected    how many parts the last shard has
                                  in_root     true: the root has seen the shard
                                  uneven      true, once the chord is known to be irregular
                                  at; ttl

Indexes are Celery's `group_index`. They have duplicates and gaps where groups end up inside other canvases, so parts are
counted by task id, and the index only assigns them to shards. Once two ids share an index, or an index is not below the size,
every record counts all shards (an irregular chord). Whoever notices marks the shards first and counts afterwards, so a part
that was recorded without seeing the mark is counted by whoever set it. Several workers may find a chord complete at once; the
first claims it. Times are Unix seconds.
"""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mdstore.aws.dynamodb.attributes import Item, from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.dynamodb.updates import expressions, given, placeholders
from mdstore.errors import ConditionFailed
from mdstore.model import OPEN_INDEX
from mdstore.queue.results.shard import SHARD, Part, Shard

Dispatch = Literal["success", "failure"]

_OPEN_SHARDS = 8  # so that the index does not funnel all chords through one of its partitions
_IN_FLIGHT = 8
#: Seconds until an open chord is looked at. Later looks are as far apart, or a quarter of its age if that is more.
_LOOK = 60
_TRUE: dict[str, Any] = {"BOOL": True}
_SUCCESS: dict[str, Any] = {"S": "success"}
#: Attributes keep the names under which release 0.1.0 wrote them.
_STORED = {"claimed": "taken", "claimed_unclean": "taken_unclean", "irregular": "uneven", "dispatched": "fired"}

_EXISTS = "attribute_exists(id)"
_FIRST_SIZE = f"{_EXISTS} AND (attribute_not_exists(#size) OR #size = :size)"
_LARGER_SIZE = f"{_EXISTS} AND #size < :size"
_UNDISPATCHED = f"{_EXISTS} AND (attribute_not_exists(#dispatched) OR #dispatched <> :success)"
_UNCLAIMED = f"{_UNDISPATCHED} AND (attribute_not_exists(#claimed) OR #claimed = :claimed)"
_UNCLAIMED_UNCLEAN = (
    f"{_EXISTS} AND attribute_not_exists(#dispatched)"
    " AND (attribute_not_exists(#claimed_unclean) OR #claimed_unclean = :claimed_unclean)"
)


@dataclass(frozen=True, kw_only=True)
class ChordState:
    """How far a chord is. `clean`: all parts succeeded. `given` is what `open` was given."""

    complete: bool = False
    clean: bool = False
    size: int = 0
    dispatched: Dispatch | None = None
    at: float = 0.0
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The parts that returned, in the order of their indexes; a part that failed and succeeded did succeed."""

    succeeded: Sequence[Part]
    failed: Sequence[Part]

    @property
    def parts(self) -> list[Part]:
        """All parts that returned, in order."""
        return sorted([*self.succeeded, *self.failed])


class ChordStates:
    """The states of the chords in one table. `retention` is how long a state is kept, in seconds.

    Raises `Unavailable` and `DeploymentBroken`.
    """

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
        """Begin a chord, before any of its parts is published; one that exists stays as it is."""
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
        self._dynamo.put_if(
            {"TableName": self._table, "Item": item, **expressions(condition="attribute_not_exists(id)")}
        )

    def resize(self, chord_id: str, size: int) -> None:
        """Set the number of parts, before the last is published; nothing where there is no such chord.

        The largest size counts: Celery 5.6 also gives the size of a group inside of the header, with the header's id. The shard
        that was the last until then expects too few parts, so such a chord is irregular.
        """
        values: Item = {"size": {"N": str(size)}}
        root = self._update_if(_FIRST_SIZE, _root(chord_id), set=values) or self._update_if(
            _LARGER_SIZE, _root(chord_id), set={**values, "irregular": _TRUE}
        )
        if root is None:
            return
        if _STORED["irregular"] in root or self._count(root) > self._shards(size):
            self._mark_irregular(chord_id)
            return
        last = self._shards(size) - 1
        expected = size - last * self._shard
        item = self._update(_shard(chord_id, last), set={"expected": {"N": str(expected)}})
        shard = Shard.read(item, size=expected)
        if shard.last >= size:
            self._mark_irregular(chord_id)
        elif len(shard.parts) >= expected:  # its parts returned before the last part of another shard was published
            self._record_full(chord_id, last, clean=shard.is_clean)

    def extend(self, chord_id: str, part: str) -> None:
        """Add a part, by its task id, to a chord that is not complete."""
        self._update(_root(chord_id), add={"added": {"SS": [part]}}, condition=_EXISTS)

    def record_part(self, chord_id: str, part: Part, *, ok: bool) -> ChordState:
        """Record that a part returned; returns how far the chord is. Raises `ConditionFailed` where the chord is gone."""
        number, place = divmod(part.index, self._shard)
        packed: dict[str, Any] = {"BS": [base64.b64encode(part.pack()).decode()]}
        item = self._update(_shard(chord_id, number), add={"ok" if ok else "failed": packed})
        shard = Shard.read(item, size=self._shard)
        is_new = number > 0 and not shard.in_root
        if not shard.irregular and (
            shard.has_duplicate_indexes or place >= shard.expected or (is_new and self._is_beyond(chord_id, number))
        ):
            self._mark_irregular(chord_id, number)
        elif not shard.irregular:
            if len(shard.parts) < shard.expected:
                return ChordState()
            root = self._record_full(chord_id, number, clean=shard.is_clean)
            if _STORED["irregular"] not in root and "added" not in root:
                shards = self._shards(_size(root))
                full, clean_ones = (len(root.get(name, {"NS": []})["NS"]) for name in ("full", "clean"))
                found = _state(root, complete=0 < shards <= full, clean=shards <= clean_ones)
                return self._claim(chord_id, part, found)
        return self._claim(chord_id, part, self.counted(chord_id))

    def counted(self, chord_id: str) -> ChordState:
        """How far a chord is by all of its shards, whether they are recorded in the root or not."""
        root, *items = self._items(chord_id)
        shard, size = _together(items), _size(root)
        expected = size + len(root.get("added", {"SS": []})["SS"])
        return _state(root, complete=size > 0 and expected <= len(shard.parts), clean=shard.is_clean, at=shard.at)

    def returned(self, chord_id: str) -> Returned:
        """The parts that returned."""
        shard = _together(self._items(chord_id)[1:])
        failed = shard.failed - shard.ok
        return Returned(
            succeeded=sorted(map(Part.unpack, shard.ok)),
            failed=sorted(map(Part.unpack, failed)),
        )

    def mark_dispatched(self, chord_id: str, outcome: Dispatch) -> None:
        """Record that the callback was dispatched, or could not be; a success stays."""
        values: Item = {"dispatched": {"S": outcome}}
        self._update_if(_UNDISPATCHED, _root(chord_id), set=values, remove=("open",), arguments={"success": _SUCCESS})

    def undispatched(self, now: float) -> Iterator[str]:
        """Chords without a dispatched callback that are due for a look, as far as the index knows."""
        for number in range(_OPEN_SHARDS):
            body: dict[str, Any] = {
                "TableName": self._table,
                "IndexName": OPEN_INDEX,
                "KeyConditionExpression": "#open = :open AND #look_at <= :now",
                "ExpressionAttributeNames": {"#open": "open", "#look_at": "look_at"},
                "ExpressionAttributeValues": to_item({":open": str(number), ":now": int(now)}),
            }
            for page in self._dynamo.pages("Query", body):
                yield from (item["id"]["S"].removeprefix(_root("")) for item in page)

    def read(self, chord_id: str, now: float) -> ChordState | None:
        """How far a chord is, and put off the next look at it.

        None where another process is looking, where its callback was dispatched, or where it is gone.
        """
        key = to_item({"id": _root(chord_id)})
        answer = self._dynamo.call("GetItem", {"TableName": self._table, "Key": key, "ConsistentRead": True})
        root: Item = answer.get("Item", {})
        seen, opened = (int(root.get(name, {"N": "0"})["N"]) for name in ("look_at", "opened_at"))
        if "open" not in root or seen > now:
            return None
        following = int(now) + max(_LOOK, (int(now) - opened) // 4)
        put_off = self._dynamo.update_if({
            "TableName": self._table,
            "Key": key,
            # The TTL is not put off: a chord whose parts are lost ends.
            **expressions(set=given(["look_at"]), condition="attribute_exists(#open) AND #look_at = :seen"),
            "ExpressionAttributeValues": to_item({":look_at": following, ":seen": seen}),
        })  # fmt: skip
        return None if put_off is None else self.counted(chord_id)

    # -- items

    def _is_beyond(self, chord_id: str, number: int) -> bool:
        """Let the root see a shard; returns whether the chord's size leaves no room for it."""
        root = self._update(_root(chord_id), add={"seen": {"NS": [str(number)]}}, condition=_EXISTS)
        if 0 < self._shards(_size(root)) <= number:
            return True
        self._update(_shard(chord_id, number), set={"in_root": _TRUE})
        return False

    def _record_full(self, chord_id: str, number: int, *, clean: bool) -> Item:
        """Record in the root that a shard is full; returns the root."""
        names = ("full", "clean") if clean else ("full",)
        shard: dict[str, Any] = {"NS": [str(number)]}
        return self._update(
            _root(chord_id), set={"look_at": self._soon()}, add=dict.fromkeys(names, shard), condition=_EXISTS
        )

    def _claim(self, chord_id: str, part: Part, found: ChordState) -> ChordState:
        """How far a chord is for `part`. Only the first part to see completion may dispatch the callback.

        A part that finds all parts to have succeeded takes precedence over one that found, or dispatched, a failure.
        """
        if not found.complete or found.dispatched == "success" or (found.dispatched and not found.clean):
            return found
        name, condition = ("claimed", _UNCLAIMED) if found.clean else ("claimed_unclean", _UNCLAIMED_UNCLEAN)
        values: Item = {"look_at": self._soon(), name: {"S": part.id}}
        arguments: Item = {"success": _SUCCESS} if found.clean else {}
        root = self._update_if(condition, _root(chord_id), set=values, arguments=arguments)
        return found if root else ChordState()

    def _soon(self) -> dict[str, Any]:
        """When to look at a chord that may be complete: whoever completed it may die before the callback is published."""
        return {"N": str(int(self._clock()) + _LOOK)}

    def _mark_irregular(self, chord_id: str, found_in: int = 0) -> None:
        """Have each record from now on count all shards.

        The shard `found_in` is marked last: if we crash midway, its next part restarts the marking.
        """
        root = self._update(_root(chord_id), set={"irregular": _TRUE}, condition=_EXISTS)
        for number in sorted(range(self._count(root)), key=found_in.__eq__):
            self._update(_shard(chord_id, number), set={"irregular": _TRUE})

    def _items(self, chord_id: str) -> list[Item]:
        """The root and the shards, empty where they do not exist, strongly consistent."""
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

    def _update(self, key: str, *, condition: str = "", **changes: Any) -> Item:
        """Change an item as `_update_if` does. Raises `ConditionFailed`."""
        item = self._update_if(condition, key, **changes)
        if item is None:
            raise ConditionFailed(f"{key}: the conditional request failed")
        return item

    def _update_if(
        self,
        condition: str,
        key: str,
        *,
        set: Mapping[str, Any] = MappingProxyType({}),  # noqa: A002  DynamoDB's own words
        add: Mapping[str, Any] = MappingProxyType({}),
        remove: Sequence[str] = (),
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> Item | None:
        """Change an item and put off its TTL; returns it as it is then, or None where the condition is not met."""
        now = int(self._clock())
        times = {"at": {"N": str(now)}, "ttl": {"N": str(now + self._retention)}}
        return self._dynamo.update_if({
            "TableName": self._table,
            "Key": to_item({"id": key}),
            **expressions(
                set=given([*times, *set]), add=given(add), remove=remove, condition=condition, names=_STORED
            ),
            "ExpressionAttributeValues": placeholders({**times, **set, **add, **arguments}),
        })  # fmt: skip

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


#: A root's attributes, all but what `open` was given.
_OWN = frozenset(
    {"id", "size", "added", "seen", "full", "clean", "open", "look_at", "opened_at", "at", "ttl", *_STORED.values()}
)


def _state(root: Item, *, complete: bool, clean: bool, at: float = 0.0) -> ChordState:
    known = from_item({name: value for name, value in root.items() if name not in ("added", "seen", "full", "clean")})
    return ChordState(
        complete=complete,
        clean=clean,
        size=known.get("size", 0),
        dispatched=known.get(_STORED["dispatched"]),
        at=max(at, float(known.get("at", 0))),
        given={name: value for name, value in known.items() if name not in _OWN},
    )
