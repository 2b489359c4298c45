"""The state of a chord: which of its parts have returned, and whether all have.

A chord has one root item, and one shard item for each 200 indexes. A shard holds two sets that only grow: the parts that
succeeded and the parts that failed. A part in both sets has succeeded. So a part may be recorded any number of times, in any
order. The part that fills a shard lists the shard in the root, and the part that fills the root completes the chord: one call
per part, and three more per shard. Every later record of a part also reads the root, and so finds what a crash left undone.

    id = chord-join-{chord}       size        number of parts, set before the last part is published
                                  added       ids of parts that were added later (SS)
                                  seen        numbers of the shards that exist, except the first (NS)
                                  full        numbers of the shards whose parts have all returned (NS)
                                  clean       numbers of the shards whose parts have all succeeded (NS)
                                  taken       the part that claimed the complete chord when all parts had succeeded; it
                                              dispatches the callback
                                  taken_unclean   the same, claimed when some part had failed
                                  uneven      true if the chord is irregular: its indexes are not 0 to size - 1, each once
                                  fired       success: the callback was dispatched; failure: the chord failed
                                  open        partition of the index of chords without a dispatched callback
                                  look_at     sort key of that index: when to check the chord, in case the worker that
                                              completed it died
                                  runs        an id for each further application of the chord while it was not dispatched
                                  opened_at
                                  at          when the item was last written
                                  ttl, and what `open` was given
    id = chord-join-{chord}#{n}   ok, failed  parts whose index is n * 200 to n * 200 + 199 (BS)
                                  expected    number of parts, in the last shard
                                  in_root     true if the root's `seen` lists the shard
                                  uneven      true once the chord is known to be irregular
                                  at, ttl

Indexes are Celery's `group_index`. They have duplicates and gaps if groups end up inside other canvases. Therefore parts are
counted by task id, and the index only assigns them to shards. A chord is irregular once two ids share an index, or an index is
not below the size; from then on every record counts all shards. The worker that notices this marks all shards first and counts
afterwards, so it counts each part that was recorded before its shard was marked. Several workers may find a chord complete at
once; the first one claims it. Times are Unix seconds.
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

_OPEN_PARTITIONS = 8  # of the index, so that one partition does not take the writes of all chords
_IN_FLIGHT = 8
#: Seconds until an open chord is checked. Later checks are as far apart, or a quarter of the chord's age if that is more.
_CHECK_AFTER = 60
_TRUE: dict[str, Any] = {"BOOL": True}
_SUCCESS: dict[str, Any] = {"S": "success"}
#: The stored names of attributes, which release 0.1.0 wrote.
_STORED = {"claimed": "taken", "claimed_unclean": "taken_unclean", "irregular": "uneven", "dispatched": "fired"}

_EXISTS = "attribute_exists(id)"
_FIRST_SIZE = f"{_EXISTS} AND (attribute_not_exists(#size) OR #size = :size)"
_LARGER_SIZE = f"{_EXISTS} AND #size < :size"
_UNDISPATCHED = f"{_EXISTS} AND (attribute_not_exists(#dispatched) OR #dispatched <> :success)"
_UNFINISHED = f"{_EXISTS} AND attribute_not_exists(#dispatched)"
_UNCLAIMED = f"{_UNDISPATCHED} AND (attribute_not_exists(#claimed) OR #claimed = :claimed)"
_UNCLAIMED_UNCLEAN = (
    f"{_EXISTS} AND attribute_not_exists(#dispatched)"
    " AND (attribute_not_exists(#claimed_unclean) OR #claimed_unclean = :claimed_unclean)"
)


@dataclass(frozen=True, kw_only=True)
class ChordState:
    """Describes the progress of a chord. `clean`: all parts that returned have succeeded. `given` is what `open` was given.

    `runs` is how often the chord was applied, and so how often its callback must run.

    `complete` is also False for a part that returned after another part had claimed the chord.
    """

    complete: bool = False
    clean: bool = False
    size: int = 0
    dispatched: Dispatch | None = None
    at: float = 0.0
    given: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 1


@dataclass(frozen=True, kw_only=True)
class Returned:
    """Holds the parts that returned, in the order of their indexes. A part that failed and later succeeded has succeeded."""

    succeeded: Sequence[Part]
    failed: Sequence[Part]

    @property
    def parts(self) -> list[Part]:
        """Return all parts that returned, in order."""
        return sorted([*self.succeeded, *self.failed])


class ChordStates:
    """Stores the states of chords in one table. `retention` is how long a state is kept after its last change, in seconds.

    Calls raise `Unavailable` and `DeploymentBroken`.
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

    def open(self, chord_id: str, *, again: str = "", **given: Any) -> None:
        """Begin a chord, before any of its parts is published. A chord that exists is not changed.

        An id `again` marks a further application of the chord and not a duplicate: the chord begins anew if its callback was
        dispatched, and otherwise gets one more run.
        """
        now = self._clock()
        item = to_item(
            {
                **given,
                "id": _root_key(chord_id),
                "open": str(zlib.crc32(chord_id.encode()) % _OPEN_PARTITIONS),
                "look_at": int(now) + _CHECK_AFTER,
                "opened_at": int(now),
                "at": int(now),
                "ttl": int(now) + self._retention,
            }
        )
        put: dict[str, Any] = {"TableName": self._table, "Item": item}
        is_new = self._dynamo.put_if({**put, **expressions(condition="attribute_not_exists(id)")})
        if is_new or not again:
            return
        run: Item = {"runs": {"SS": [again]}}
        if self._update_if(_UNFINISHED, _root_key(chord_id), add=run) is None:
            self._forget_parts(chord_id)
            self._dynamo.put_if(put)

    def resize(self, chord_id: str, size: int) -> None:
        """Set the number of parts, before the last part is published. Do nothing if there is no such chord.

        The largest size counts, because Celery 5.6 also reports the size of a group inside the header under the header's id.
        The shard that was the last one under a smaller size expects too few parts, so such a chord is irregular.
        """
        values: Item = {"size": {"N": str(size)}}
        root = self._update_if(_FIRST_SIZE, _root_key(chord_id), set=values) or self._update_if(
            _LARGER_SIZE, _root_key(chord_id), set={**values, "irregular": _TRUE}
        )
        if root is None:
            return
        if _STORED["irregular"] in root or self._shard_count(root) > self._shards_for(size):
            self._mark_irregular(chord_id)
            return
        last = self._shards_for(size) - 1
        expected = size - last * self._shard
        item = self._update(_shard_key(chord_id, last), set={"expected": {"N": str(expected)}})
        shard = Shard.read(item, size=expected)
        if shard.last >= size:
            self._mark_irregular(chord_id)
        elif len(shard.parts) >= expected:  # its parts returned before the last part, of another shard, was published
            self._record_full(chord_id, last, clean=shard.is_clean)

    def extend(self, chord_id: str, part: str) -> None:
        """Add a part, by its task id, to a chord that is not complete."""
        self._update(_root_key(chord_id), add={"added": {"SS": [part]}}, condition=_EXISTS)

    def record_part(self, chord_id: str, part: Part, *, ok: bool) -> ChordState:
        """Record that a part returned, and return the chord's progress. Raises `ConditionFailed` if the chord has expired."""
        number, place = divmod(part.index, self._shard)
        packed: dict[str, Any] = {"BS": [base64.b64encode(part.pack()).decode()]}
        item = self._update(_shard_key(chord_id, number), add={"ok" if ok else "failed": packed})
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
                shards = self._shards_for(_size(root))
                full, clean_ones = (len(root.get(name, {"NS": []})["NS"]) for name in ("full", "clean"))
                found = _state_of(root, complete=0 < shards <= full, clean=shards <= clean_ones)
                return self._claim(chord_id, part, found)
        return self._claim(chord_id, part, self.counted(chord_id))

    def counted(self, chord_id: str) -> ChordState:
        """Return a chord's progress, counted over all shards, whether the root lists them as full or not."""
        root, *items = self._items(chord_id)
        shard, size = _merged(items), _size(root)
        expected = size + len(root.get("added", {"SS": []})["SS"])
        return _state_of(root, complete=size > 0 and expected <= len(shard.parts), clean=shard.is_clean, at=shard.at)

    def returned(self, chord_id: str) -> Returned:
        """Return the parts that returned."""
        shard = _merged(self._items(chord_id)[1:])
        failed = shard.failed - shard.ok
        return Returned(
            succeeded=sorted(map(Part.unpack, shard.ok)),
            failed=sorted(map(Part.unpack, failed)),
        )

    def failed(self, chord_id: str) -> list[Part] | None:
        """Return the parts that have failed so far, in the order of their indexes, or None if there is no such chord.

        Shards that the root lists as clean are not read: all of their parts have succeeded.
        """
        (root,) = self._get([_root_key(chord_id)])
        if not root:
            return None
        is_regular = _STORED["irregular"] not in root and "added" not in root
        clean = root.get("clean", {"NS": []})["NS"] if is_regular else []
        numbers = [number for number in range(self._shard_count(root)) if str(number) not in clean]
        shard = _merged(self._get([_shard_key(chord_id, number) for number in numbers]))
        return sorted(map(Part.unpack, shard.failed - shard.ok))

    def mark_dispatched(self, chord_id: str, outcome: Dispatch) -> int:
        """Record that the callback was dispatched (success) or the chord has failed. A recorded success is not overwritten.

        Return how many runs the chord has had so far.
        """
        values: Item = {"dispatched": {"S": outcome}}
        root = self._update_if(
            _UNDISPATCHED, _root_key(chord_id), set=values, remove=("open",), arguments={"success": _SUCCESS}
        )
        return _runs(root or {})

    def undispatched(self, now: float) -> Iterator[str]:
        """Yield the chords that are due for a check and have no dispatched callback. The index may lag behind."""
        for number in range(_OPEN_PARTITIONS):
            body: dict[str, Any] = {
                "TableName": self._table,
                "IndexName": OPEN_INDEX,
                "KeyConditionExpression": "#open = :open AND #look_at <= :now",
                "ExpressionAttributeNames": {"#open": "open", "#look_at": "look_at"},
                "ExpressionAttributeValues": to_item({":open": str(number), ":now": int(now)}),
            }
            for page in self._dynamo.pages("Query", body):
                yield from (item["id"]["S"].removeprefix(_root_key("")) for item in page)

    def read(self, chord_id: str, now: float) -> ChordState | None:
        """Return a chord's progress, and postpone its next check.

        Return None if another process checks the chord, if the callback was dispatched, or if the chord has expired.
        """
        key = to_item({"id": _root_key(chord_id)})
        answer = self._dynamo.call("GetItem", {"TableName": self._table, "Key": key, "ConsistentRead": True})
        root: Item = answer.get("Item", {})
        look_at, opened_at = (int(root.get(name, {"N": "0"})["N"]) for name in ("look_at", "opened_at"))
        if "open" not in root or look_at > now:
            return None
        next_look = int(now) + max(_CHECK_AFTER, (int(now) - opened_at) // 4)
        postponed = self._dynamo.update_if({
            "TableName": self._table,
            "Key": key,
            # This does not extend the TTL, so a chord whose parts are lost expires.
            **expressions(set=given(["look_at"]), condition="attribute_exists(#open) AND #look_at = :seen"),
            "ExpressionAttributeValues": to_item({":look_at": next_look, ":seen": look_at}),
        })  # fmt: skip
        return None if postponed is None else self.counted(chord_id)

    # -- items

    def _forget_parts(self, chord_id: str) -> None:
        """Delete the shards of a chord that is applied again: its parts have the same ids, and will return again."""
        _, *shards = self._items(chord_id)
        for number in range(len(shards)):
            key = to_item({"id": _shard_key(chord_id, number)})
            self._dynamo.call("DeleteItem", {"TableName": self._table, "Key": key})

    def _is_beyond(self, chord_id: str, number: int) -> bool:
        """List a new shard in the root, and return whether it lies beyond the chord's size."""
        root = self._update(_root_key(chord_id), add={"seen": {"NS": [str(number)]}}, condition=_EXISTS)
        if 0 < self._shards_for(_size(root)) <= number:
            return True
        self._update(_shard_key(chord_id, number), set={"in_root": _TRUE})
        return False

    def _record_full(self, chord_id: str, number: int, *, clean: bool) -> Item:
        """List a shard in the root as full, and return the root."""
        names = ("full", "clean") if clean else ("full",)
        shard: dict[str, Any] = {"NS": [str(number)]}
        return self._update(
            _root_key(chord_id), set={"look_at": self._soon()}, add=dict.fromkeys(names, shard), condition=_EXISTS
        )

    def _claim(self, chord_id: str, part: Part, found: ChordState) -> ChordState:
        """Claim a chord for `part` if `found` is complete. Only the first part to see completion may dispatch the callback.

        Return `found`, or a state that is not complete if another part has claimed the chord. A part that finds all parts
        succeeded takes precedence over one that found, or dispatched, a failure.
        """
        if not found.complete or found.dispatched == "success" or (found.dispatched and not found.clean):
            return found
        name, condition = ("claimed", _UNCLAIMED) if found.clean else ("claimed_unclean", _UNCLAIMED_UNCLEAN)
        values: Item = {"look_at": self._soon(), name: {"S": part.id}}
        arguments: Item = {"success": _SUCCESS} if found.clean else {}
        root = self._update_if(condition, _root_key(chord_id), set=values, arguments=arguments)
        return found if root else ChordState()

    def _soon(self) -> dict[str, Any]:
        """Return when to check a chord that may be complete, in case the worker that completed it dies before publishing."""
        return {"N": str(int(self._clock()) + _CHECK_AFTER)}

    def _mark_irregular(self, chord_id: str, found_in: int = 0) -> None:
        """Make every later record of a part count all shards.

        Mark the shard `found_in` last: if we crash midway, its next part restarts the marking.
        """
        root = self._update(_root_key(chord_id), set={"irregular": _TRUE}, condition=_EXISTS)
        for number in sorted(range(self._shard_count(root)), key=found_in.__eq__):
            self._update(_shard_key(chord_id, number), set={"irregular": _TRUE})

    def _items(self, chord_id: str) -> list[Item]:
        """Return the root and all shards, read with strong consistency. An item that does not exist is empty."""
        (root,) = self._get([_root_key(chord_id)])
        while True:
            count = self._shard_count(root)
            root, *shards = self._get([_root_key(chord_id), *(_shard_key(chord_id, number) for number in range(count))])
            if self._shard_count(root) == count:
                return [root, *shards]

    def _get(self, ids: list[str]) -> list[Item]:
        batches = [ids[start : start + 100] for start in range(0, len(ids), 100)]
        tasks = (self._dynamo.batch_get(self._table, [to_item({"id": one}) for one in batch]) for batch in batches)
        found = {item["id"]["S"]: item for items in self._dynamo.run(tasks, in_flight=_IN_FLIGHT) for item in items}
        return [found.get(one, {}) for one in ids]

    def _update(self, key: str, *, condition: str = "", **changes: Any) -> Item:
        """Change an item like `_update_if`, and return it. Raises `ConditionFailed`."""
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
        """Change an item and extend its TTL. Return the changed item, or None if the condition is not met."""
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

    def _shards_for(self, size: int) -> int:
        return -(-size // self._shard)

    def _shard_count(self, root: Item) -> int:
        """Return how many shards the chord has or, by its size, will have."""
        return max(
            self._shards_for(_size(root)), *(int(number) + 1 for number in root.get("seen", {"NS": ["0"]})["NS"])
        )


def _root_key(chord_id: str) -> str:
    return f"chord-join-{chord_id}"


def _size(root: Item) -> int:
    return int(root.get("size", {"N": "0"})["N"])


def _runs(root: Item) -> int:
    return 1 + len(root.get("runs", {"SS": []})["SS"])


def _shard_key(chord_id: str, number: int) -> str:
    return f"{_root_key(chord_id)}#{number}"


def _merged(items: Sequence[Item]) -> Shard:
    shards = [Shard.read(item, size=0) for item in items]
    return Shard(
        ok=frozenset().union(*(shard.ok for shard in shards)),
        failed=frozenset().union(*(shard.failed for shard in shards)),
        at=max((shard.at for shard in shards), default=0.0),
    )


#: The attributes of a root that `open` was not given.
_OWN_ATTRIBUTES = frozenset(
    {
        "id",
        "size",
        "added",
        "seen",
        "full",
        "clean",
        "open",
        "look_at",
        "opened_at",
        "runs",
        "at",
        "ttl",
        *_STORED.values(),
    }
)


def _state_of(root: Item, *, complete: bool, clean: bool, at: float = 0.0) -> ChordState:
    known = from_item(
        {name: value for name, value in root.items() if name not in ("added", "seen", "full", "clean", "runs")}
    )
    return ChordState(
        complete=complete,
        clean=clean,
        size=known.get("size", 0),
        dispatched=known.get(_STORED["dispatched"]),
        runs=_runs(root),
        at=max(at, float(known.get("at", 0))),
        given={name: value for name, value in known.items() if name not in _OWN_ATTRIBUTES},
    )
