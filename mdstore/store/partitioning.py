"""Partitioning: which lane an operation belongs to. It runs once, at the producer."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Collection

from mdstore.model import Operation
from mdstore.store.operations import Indexed

#: Of a lane, and so of one key or group in a request: a worker decodes a lane whole, and runs one key's operations one by one.
MAX_LANE_OPERATIONS = 200_000


class Partition:
    """Deals operations to lanes so that a key, and a group, lives in exactly one lane.

    Operations sharing a key or a group are one component (union-find). A component goes to the lane that its hash names, so
    nothing is kept per key: 16 bytes an operation, whatever the keys are. Only keys of groups are remembered.
    """

    def __init__(self) -> None:
        self._keys = array("Q")
        self._sizes = array("Q")
        self._parents: dict[int, int] = {}
        self._group_keys: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, operation: Operation | Indexed, size: int) -> None:
        """Note the next operation; `size` is its JSON line's, in bytes."""
        key = _hash(f"{operation.entity}#{operation.key}")
        self._keys.append(key)
        self._sizes.append(size)
        if operation.group is not None:
            self._unite(key, self._group_keys.setdefault(operation.group, key))

    def lanes(self, *, operations: int, size: int, limit: int = 2**63) -> list[array[int]]:
        """Positions of the operations of each lane, in the order given; about `operations` and `size` bytes a lane.

        A lane is over `limit` bytes, or `MAX_LANE_OPERATIONS`, only where one component is. Where it would be otherwise, a
        component of more than half of that has a lane of its own.
        """
        roots = array("Q", (self._find(key) if key in self._parents else key for key in self._keys))
        total = sum(self._sizes)
        count = max(-(-len(roots) // operations), -(-total // size))
        alone: set[int] = set()
        share = limit // MAX_LANE_OPERATIONS  # of a lane's bytes, that the smallest operation counts for
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
        """The components of more than `most` bytes. Only `heavy` lanes are looked into, which takes little memory."""
        sizes: dict[int, int] = defaultdict(int)
        for root, size in zip(roots, self._sizes, strict=True):
            if root % count in heavy:
                sizes[root] += max(size, share)
        return {root for root, size in sizes.items() if size > most}

    def _heavy(self, roots: array[int], count: int, most: int, share: int, alone: Collection[int] = ()) -> set[int]:
        """The lanes of more than `most` bytes, without the components that are `alone`."""
        sizes: dict[int, int] = defaultdict(int)
        for root, size in zip(roots, self._sizes, strict=True):
            if root not in alone:
                sizes[root % count] += size if size > share else share
        return {lane for lane, size in sizes.items() if size > most}

    def _unite(self, left: int, right: int) -> None:
        self._parents.setdefault(left, left)
        self._parents.setdefault(right, right)
        left, right = self._find(left), self._find(right)
        # The smaller hash wins, so that the result does not depend on the order of the groups.
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
