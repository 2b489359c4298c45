"""A shard of a join, as an item says it: which parts have returned, packed."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

from mdstore.aws.dynamodb.attributes import Item

SHARD = 200
_TEXT = 1 << 31  # marks a packed part whose id is text and no UUID


@dataclass(frozen=True, order=True)
class Part:
    """One part of a join."""

    index: int
    id: str

    def pack(self) -> bytes:
        """20 bytes where the id is a UUID: an item is charged by its size, each time that it is written."""
        try:
            uuid = UUID(self.id)
        except ValueError:
            uuid = None
        if uuid is not None and str(uuid) == self.id:
            return self.index.to_bytes(4, "big") + uuid.bytes
        return (self.index | _TEXT).to_bytes(4, "big") + self.id.encode()

    @classmethod
    def unpack(cls, packed: bytes) -> Part:
        """What was packed."""
        index = int.from_bytes(packed[:4], "big")
        if index & _TEXT:
            return cls(index ^ _TEXT, packed[4:].decode())
        return cls(index, str(UUID(bytes=packed[4:])))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard's item, or several together."""

    ok: frozenset[bytes] = frozenset()
    failed: frozenset[bytes] = frozenset()
    expected: int = SHARD
    in_root: bool = False
    irregular: bool = False
    at: float = 0.0

    @classmethod
    def read(cls, item: Item, *, size: int) -> Shard:
        """One item; `size` is how many parts it holds unless it says so itself."""
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
        """Those that returned."""
        return self.ok | self.failed if self.failed else self.ok

    @property
    def is_clean(self) -> bool:
        """Whether all that returned did succeed."""
        return self.failed <= self.ok

    @property
    def has_duplicate_indexes(self) -> bool:
        """Whether two parts have one index."""
        return len({packed[:4] for packed in self.parts}) < len(self.parts)

    @property
    def last(self) -> int:
        """The largest index."""
        return max((Part.unpack(packed).index for packed in self.parts), default=0)


def _members(item: Item, name: str) -> frozenset[bytes]:
    return frozenset(map(base64.b64decode, item[name]["BS"])) if name in item else frozenset()
