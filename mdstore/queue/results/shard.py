"""A shard of a chord's state as its item holds it: the parts that returned, packed into bytes."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

from mdstore.aws.dynamodb.attributes import Item

SHARD = 200  # indexes that one shard holds
_TEXT = 1 << 31  # marks a packed part whose id is not a UUID


@dataclass(frozen=True, order=True)
class Part:
    """Identifies a part of a chord by its `group_index` and its task id."""

    index: int
    id: str

    def pack(self) -> bytes:
        """Return the part as bytes: 20 if the id is a UUID. DynamoDB charges each write of an item by the item's size."""
        try:
            uuid = UUID(self.id)
        except ValueError:
            uuid = None
        if uuid is not None and str(uuid) == self.id:
            return self.index.to_bytes(4, "big") + uuid.bytes
        return (self.index | _TEXT).to_bytes(4, "big") + self.id.encode()

    @classmethod
    def unpack(cls, packed: bytes) -> Part:
        """Return the part that `pack` turned into these bytes."""
        index = int.from_bytes(packed[:4], "big")
        if index & _TEXT:
            return cls(index ^ _TEXT, packed[4:].decode())
        return cls(index, str(UUID(bytes=packed[4:])))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Holds the content of one shard's item, or of several merged.

    `ok` and `failed` are packed parts. `expected` is how many parts the shard gets. `in_root`: the root item lists the shard.
    `irregular`: the chord is known to be irregular. `at` is when the item was last written, in Unix seconds.
    """

    ok: frozenset[bytes] = frozenset()
    failed: frozenset[bytes] = frozenset()
    expected: int = SHARD
    in_root: bool = False
    irregular: bool = False
    at: float = 0.0

    @classmethod
    def read(cls, item: Item, *, size: int) -> Shard:
        """Read an item. `size` is how many parts the shard gets if the item does not say so."""
        numbers = {name: float(item[name]["N"]) for name in ("expected", "at") if name in item}
        return cls(
            ok=_members(item, "ok"),
            failed=_members(item, "failed"),
            expected=int(numbers.get("expected", size)),
            in_root="in_root" in item,
            irregular="uneven" in item,
            at=numbers.get("at", 0.0),
        )

    @cached_property
    def parts(self) -> frozenset[bytes]:
        """Return the parts that returned."""
        return self.ok | self.failed if self.failed else self.ok

    @property
    def is_clean(self) -> bool:
        """Return whether all parts that returned have succeeded."""
        return self.failed <= self.ok

    @property
    def has_duplicate_indexes(self) -> bool:
        """Return whether two parts have the same index."""
        return len({packed[:4] for packed in self.parts}) < len(self.parts)

    @property
    def last(self) -> int:
        """Return the largest index, 0 if no part returned."""
        return max((Part.unpack(packed).index for packed in self.parts), default=0)


def _members(item: Item, name: str) -> frozenset[bytes]:
    return frozenset(map(base64.b64decode, item[name]["BS"])) if name in item else frozenset()
