"""Partitioning: assigns each operation to a lane. It runs once, at the producer."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Collection

from mdstore.model import Operation
from mdstore.store.operations import Indexed

#: The limit per lane, and so per key or group of a request. A worker decodes a whole lane, and applies the operations of each
#: key one after the other.
MAX_LANE_OPERATIONS = 200_000


class Partition:
    """Assigns operations to lanes so that all operations on a key, and all of a group, are in one lane.

    Operations that share a key or a group are one component (union-find). The hash of a component selects its lane, so only the
    keys of groups are kept. Otherwise memory is 16 bytes per operation, however many keys there are.
    """

    def __init__(self) -> None:
        self._keys = array("Q")
        self._sizes = array("Q")
        self._parents: dict[int, int] = {}
        self._group_keys: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, operation: Operation | Indexed, size: int) -> int:
        """Record the next operation, and return the hash of its key; `size` is the length of its JSON line in bytes."""
        key = _hash(f"{operation.entity}#{operation.key}")
        self._keys.append(key)
        self._sizes.append(size)
        if operation.group is not None:
            self._unite(key, self._group_keys.setdefault(operation.group, key))
        return key

    def lanes(self, *, operations: int, size: int, limit: int = 2**63) -> list[array[int]]:
        """Return the positions of each lane's operations, in the order given: about `operations` and `size` bytes per lane.

        A lane exceeds `limit` bytes or `MAX_LANE_OPERATIONS` only if a single component does. To ensure that, components of
        more than half of either limit get a lane of their own, and the number of lanes is doubled while a lane is too large.
        """
        roots = array("Q", (self._find(key) if key in self._parents else key for key in self._keys))
        total = sum(self._sizes)
        count = max(-(-len(roots) // operations), -(-total // size))
        alone: set[int] = set()
        share = (
            limit // MAX_LANE_OPERATIONS
        )  # bytes that an operation counts for at least, so that `limit` bounds the count too
        if total > limit or len(roots) > MAX_LANE_OPERATIONS:
            heavy = self._heavy(roots, count, limit // 2, share)
            if heavy:
                alone = self._large(roots, count, limit // 2, share, heavy)
            while heavy and self._heavy(roots, count, limit, share, alone):
                count *= 2
        own = {root: count + number for number, root in enumerate(sorted(alone))}
        lanes: dict[int, array[int]] = defaultdict(lambda: array("L"))
        for position, root in enumerate(roots):
            lanes[own.get(root) or root % count].append(position)
        return [lanes[number] for number in sorted(lanes)]

    def _large(self, roots: array[int], count: int, most: int, share: int, heavy: Collection[int]) -> set[int]:
        """Return the components of more than `most` bytes. Examine only the `heavy` lanes, to save memory."""
        sizes: dict[int, int] = defaultdict(int)
        for root, size in zip(roots, self._sizes, strict=True):
            if root % count in heavy:
                sizes[root] += max(size, share)
        return {root for root, size in sizes.items() if size > most}

    def _heavy(self, roots: array[int], count: int, most: int, share: int, alone: Collection[int] = ()) -> set[int]:
        """Return the lanes of more than `most` bytes, not counting the components that are `alone` in a lane."""
        sizes: dict[int, int] = defaultdict(int)
        for root, size in zip(roots, self._sizes, strict=True):
            if root not in alone:
                sizes[root % count] += size if size > share else share
        return {lane for lane, size in sizes.items() if size > most}

    def _unite(self, left: int, right: int) -> None:
        if left == right:  # the first operation of a group
            return
        self._parents.setdefault(left, left)
        self._parents.setdefault(right, right)
        left, right = self._find(left), self._find(right)
        # The smaller hash becomes the root, so that the result does not depend on the order of the groups.
        self._parents[max(left, right)] = min(left, right)

    def _find(self, key: int) -> int:
        root = key
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[key] != root:
            self._parents[key], key = root, self._parents[key]
        return root


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
