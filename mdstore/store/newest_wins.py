"""Requests in which the newest operation of a key wins, in whatever order the source's messages arrive.

A sequence alone does that for `upsert` and `delete`. The other operations depend on the state that they find: an `update` that
arrives before its `insert` is refused, and the older `insert` then applies. So in a request with `newest_wins`, an `insert`
and an `update` are upserts. What the sequence alone cannot decide is refused: a patch, which changes a record that may not
exist yet, and the conditions of `check`, `expect_version` and `group`.
"""

from __future__ import annotations

import msgspec

from mdstore.model import Operation
from mdstore.store.operations import OPERATIONS, Effect
from mdstore.store.validation import FieldError


def by_sequence(operation: Operation) -> Operation:
    """Return the operation as a request with `newest_wins` applies it. Raises `FieldError` if its sequence cannot decide."""
    effect = OPERATIONS[operation.op].effect
    if effect not in (Effect.SET, Effect.REMOVE):
        raise FieldError("op", f"newest_wins takes insert, update, upsert and delete, and not {operation.op}")
    if operation.sequence is None:
        raise FieldError("sequence", "newest_wins needs one for every operation")
    for field in ("expect_version", "group"):
        if getattr(operation, field) is not None:
            raise FieldError(field, "newest_wins takes none: it would keep a newer operation from winning")
    return msgspec.structs.replace(operation, op="upsert") if effect is Effect.SET else operation
