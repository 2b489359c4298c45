"""The one table of the kinds of operations.

Validation, writes, refusals, outcomes, verification, files, the command line and the API all read it. To add a kind, add its
name to `mdstore.model.OpName` and a row here; if its effect on data is new, add that to `Effect` and `effect_on`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any

import msgspec

from mdstore.model import OpName


class Effect(StrEnum):
    """The effect of an operation on its record's data."""

    SET = "set"  # replaces the data
    MERGE = "merge"  # merges into the existing data (RFC 7396), so a worker reads the record first
    REMOVE = "remove"  # replaces the record with a tombstone
    NONE = "none"  # changes nothing: the operation is a condition for its group


class Needs(StrEnum):
    """The state that an operation requires of its record; otherwise it is refused."""

    ABSENT = "absent"
    PRESENT = "present"
    EITHER = "either"


@dataclass(frozen=True, kw_only=True)  # no slots: `cached_property` needs a `__dict__`
class OperationSpec:
    """The properties of one kind of operation.

    `past` is the past participle of its name, for texts. `takes_version` and `takes_sequence` say whether an operation may have
    an `expect_version` or a `sequence`.
    """

    past: str
    needs: Needs
    effect: Effect
    takes_version: bool = True
    takes_sequence: bool = True

    @cached_property
    def needs_data(self) -> bool:
        """Return whether the operation must have data; without this, it must not have any."""
        return self.effect in (Effect.SET, Effect.MERGE)

    def needs_of(self, *, has_sequence: bool) -> Needs:
        """Return the state that an operation with or without a sequence requires of its record.

        A delete with a sequence requires none. If there is no record yet, the delete was faster than the older operation that
        creates the record. The tombstone that the delete leaves refuses that operation.
        """
        return Needs.EITHER if has_sequence and self.effect is Effect.REMOVE else self.needs

    @cached_property
    def writes(self) -> bool:
        """Return whether the operation changes its record at all."""
        return self.effect is not Effect.NONE

    @cached_property
    def merges(self) -> bool:
        """Return whether a worker must read the record and merge the data into it."""
        return self.effect is Effect.MERGE


OPERATIONS: Mapping[OpName, OperationSpec] = MappingProxyType({
    "insert": OperationSpec(past="inserted", needs=Needs.ABSENT, effect=Effect.SET, takes_version=False),
    "update": OperationSpec(past="updated", needs=Needs.PRESENT, effect=Effect.SET),
    "patch": OperationSpec(past="patched", needs=Needs.PRESENT, effect=Effect.MERGE),
    "upsert": OperationSpec(past="upserted", needs=Needs.EITHER, effect=Effect.SET),
    "delete": OperationSpec(past="deleted", needs=Needs.PRESENT, effect=Effect.REMOVE),
    "check": OperationSpec(past="checked", needs=Needs.PRESENT, effect=Effect.NONE, takes_sequence=False),
})  # fmt: skip

#: The kinds that change a record, in the order of the table. The rows of a file can be imported as any of them.
WRITING_OPS: tuple[OpName, ...] = tuple(op for op, spec in OPERATIONS.items() if spec.writes)


#: The value of a `Raw` field that was not given: no JSON at all.
NOTHING = msgspec.Raw(b"")


class Indexed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A line of a lane: a validated operation with its zero-based `index` in the request.

    The operation's data stays encoded, in one of two fields. `attribute` holds DynamoDB JSON that fits an item, so a worker
    sends it unchanged. `data` holds plain JSON that a worker must process first: a patch, or data that may not fit an item.
    """

    index: int
    op: OpName
    entity: str
    key: str
    attribute: msgspec.Raw = NOTHING
    data: msgspec.Raw = NOTHING
    expect_version: int | None = None
    sequence: int | None = None
    group: str | None = None

    @property
    def size(self) -> int:
        """The bytes of JSON that the data adds to a transaction. Data that goes to S3 adds none."""
        return len(self.data) if self.is_merged else len(self.attribute)

    @property
    def is_merged(self) -> bool:
        """Return whether a worker must read the record and merge the data into it."""
        return OPERATIONS[self.op].merges


def effect_on(data: Any, op: OpName, given: Any) -> Any:
    """Return a record's data after an operation with the data `given`. None stands for an absent record."""
    match OPERATIONS[op].effect:
        case Effect.SET:
            return given
        case Effect.MERGE:
            return merged(data, given)
        case Effect.REMOVE:
            return None
        case Effect.NONE:
            return data


def merged(target: Any, patch: Any) -> Any:
    """Apply a JSON Merge Patch (RFC 7396): objects merge, null removes, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
