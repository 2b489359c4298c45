"""The one table of what an operation is.

Validation, writes, refusals, outcomes, verification, files, command line and API read it. To add a kind of operation, add its
name to `mdstore.model.OpName` and its row here; where its effect on data is a new one, add that to `Effect` and `effect_on`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import msgspec

from mdstore.model import OpName


class Effect(StrEnum):
    """What an operation does to its record's data."""

    SET = "set"  # replaced whole
    MERGE = "merge"  # merged into what is there (RFC 7396), so a worker reads the record first
    REMOVE = "remove"  # a tombstone takes the record's place
    NONE = "none"  # nothing: a condition for its group


class Needs(StrEnum):
    """What an operation needs the record to be; otherwise it is refused."""

    ABSENT = "absent"
    PRESENT = "present"
    EITHER = "either"


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationSpec:
    """What a kind of operation is.

    `past` says that it was done. `takes_version` and `takes_sequence` tell whether it may have `expect_version`, `sequence`.
    """

    past: str
    needs: Needs
    effect: Effect
    takes_version: bool = True
    takes_sequence: bool = True

    @property
    def needs_data(self) -> bool:
        """Whether it has data; other operations take none."""
        return self.effect in (Effect.SET, Effect.MERGE)

    @property
    def needs_record(self) -> bool:
        """Whether there must be a record."""
        return self.needs is Needs.PRESENT

    @property
    def may_create(self) -> bool:
        """Whether there may be a record that was not there before. A tombstone may expire at any moment."""
        return not self.needs_record

    @property
    def writes(self) -> bool:
        """Whether it changes its record at all."""
        return self.effect is not Effect.NONE


OPERATIONS: Mapping[OpName, OperationSpec] = MappingProxyType({
    "insert": OperationSpec(past="inserted", needs=Needs.ABSENT, effect=Effect.SET, takes_version=False),
    "update": OperationSpec(past="updated", needs=Needs.PRESENT, effect=Effect.SET),
    "patch": OperationSpec(past="patched", needs=Needs.PRESENT, effect=Effect.MERGE),
    "upsert": OperationSpec(past="upserted", needs=Needs.EITHER, effect=Effect.SET),
    "delete": OperationSpec(past="deleted", needs=Needs.PRESENT, effect=Effect.REMOVE),
    "check": OperationSpec(past="checked", needs=Needs.PRESENT, effect=Effect.NONE, takes_sequence=False),
})  # fmt: skip

#: The kinds that change a record, in the table's order: what a file's rows can become.
WRITING_OPS: tuple[OpName, ...] = tuple(op for op, spec in OPERATIONS.items() if spec.writes)


#: No JSON at all: what a `Raw` field holds that was not given.
NOTHING = msgspec.Raw(b"")


class Indexed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A line of a lane: a checked operation with its zero-based `index` in the request, as a worker reads it.

    Its data is kept as text. `attribute` is data in DynamoDB JSON, small enough for an item, so a worker sends it as it
    stands; `data` is data in plain JSON, which a worker has to look at first: a patch's, and what may not fit an item.
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
        """Bytes of JSON that the data adds to a transaction; what no item can hold goes to S3 and adds none."""
        return len(self.data) if self.is_merged else len(self.attribute)

    @property
    def is_merged(self) -> bool:
        """Whether its data is merged into the record's, which a worker reads first."""
        return OPERATIONS[self.op].effect is Effect.MERGE


def effect_on(data: Any, op: OpName, given: Any) -> Any:
    """What an operation with the data `given` makes of a record's `data`; None for a record that is absent."""
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
    """JSON Merge Patch (RFC 7396): objects merge, null removes, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
