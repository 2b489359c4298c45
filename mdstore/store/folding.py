"""Folding: one write applies several operations on one key that follow each other, a *fold*.

The write has the condition of the fold's first operation and the effect of its last, and adds one version per operation. So an
operation may join a fold only if it is certain to apply once the operation before it has: that operation determines the state
in which it finds the record, whatever the record was before the fold.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from mdstore.store.operations import OPERATIONS, Effect, Indexed, Needs

Fold = list[Indexed]  # operations on one key, in order; usually one

#: Bytes that the refusals of a transaction's folds may take in its receipt, which is an item of at most 400 KB. The other
#: operations of a transaction are at most 99.
MAX_REFUSAL_BYTES = 64 * 2**10
_REFUSAL_BYTES = 250  # of one refusal, with a usual detail and without entity and key


def joins(item: Indexed, last: Indexed) -> bool:
    """Return whether `item`, the next operation on the key of `last`, is certain to apply once `last` has applied."""
    if item.data or last.data:
        return False  # a patch is merged into the record, and large data is uploaded, before it is written
    if item.group is not None or last.group is not None or item.expect_version is not None:
        return False
    before, spec = OPERATIONS[last.op], OPERATIONS[item.op]
    if not (before.writes and spec.writes):
        return False
    if (last.sequence is None) != (item.sequence is None):
        return False
    if last.sequence is not None and item.sequence is not None and item.sequence <= last.sequence:
        return False
    is_absent = before.effect is Effect.REMOVE
    needs = spec.needs_of(has_sequence=item.sequence is not None)
    return needs is Needs.EITHER or needs is (Needs.ABSENT if is_absent else Needs.PRESENT)


def refusal_bytes(item: Indexed) -> int:
    """Return about how many bytes a refusal of an operation takes in a receipt."""
    return _REFUSAL_BYTES + len(f"{item.entity}{item.key}".encode())


def folds_of(operations: Iterable[Indexed]) -> list[Fold]:
    """Divide the operations of a transaction into its folds: those on the same key are one fold."""
    return [list(fold) for _, fold in groupby(operations, key=lambda item: (item.entity, item.key))]
