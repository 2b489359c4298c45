"""The data types that the whole package shares: operations, refusals, outcomes, states and messages.

Values that cross a boundary are frozen and keyword-only. `Operation` is a msgspec struct because the hot path decodes one from
JSON for every operation. Checks that go beyond types are in `store.validation`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec

from mdstore.errors import InvalidRequest

#: Version 2 folds operations (`store.folding`), so its lanes have other transactions than those of version 1, and its payloads
#: say which models they were checked against.
SCHEMA_VERSION = 2
#: The version before this one is accepted too, so that producers and workers can be upgraded separately.
ACCEPTED_VERSIONS = frozenset({SCHEMA_VERSION - 1, SCHEMA_VERSION}) - {0}

#: Seconds during which a request may be sent and delivered: SQS keeps a message for 14 days, the ledger keeps receipts for 15.
MAX_AGE = 14 * 86_400

#: Days after which S3 deletes an object of the claim check, by the lifecycle rule of its prefix. The shortest covers 14 days in
#: the queue, 14 in the dead-letter queue and 14 more after a resend; the others are for messages that are delayed for longer.
#: Do not remove a value from this list while objects that were stored under it may still exist.
CLAIM_DAYS = (45, 400, 3_720)
#: The results table's index of chords whose callback was not dispatched yet. Hash key `open`, range key `look_at`, keys only.
OPEN_INDEX = "open"

#: A count, an offset or a length in a payload.
Whole = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]

OpName = Literal["insert", "update", "patch", "upsert", "delete", "check"]


class Reason(StrEnum):
    """Why an operation was refused. A refusal is final: it is never retried."""

    EXISTS = "exists"
    MISSING = "missing"
    VERSION_MISMATCH = "version_mismatch"
    STALE = "stale"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    GROUP_REFUSED = "group_refused"


class State(StrEnum):
    """The state of a request, or of one lane. `docs/states.md` shows every transition."""

    ACCEPTED = "accepted"  # its payload is in S3 and its message is in SQS
    RUNNING = "running"  # a worker has started it
    COMPLETED = "completed"  # every operation has an outcome
    FAILED = "failed"  # a lane failed; sending its messages again resumes the request


FINAL_STATES = frozenset({State.COMPLETED, State.FAILED})


class Operation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One intended change of one record.

    `data` is a JSON object (numbers are int or Decimal). `sequence` is any integer that grows with each change at the source.
    `group` ties operations of one request together: all of them apply, or none does.
    """

    op: OpName
    entity: str
    key: str
    data: dict[str, Any] | None = None
    expect_version: int | None = None
    sequence: int | None = None
    group: str | None = None


class Refusal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An operation that was refused, and why. `op`, `entity` and `key` are empty if the line could not be decoded."""

    index: int
    reason: Reason
    detail: str = ""
    op: str = ""
    entity: str = ""
    key: str = ""


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outcome of one operation."""

    index: int
    outcome: Literal["applied", "refused", "failed"]
    op: str = ""
    entity: str = ""
    key: str = ""
    reason: str = ""
    detail: str = ""


class BatchedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request of a batch: its id, the digest of its content, and how many operations it has.

    In the batch, the operations of its requests have consecutive indexes. `first` is the index of this request's first one.
    """

    request_id: str
    content: str
    first: Whole
    operations: Whole
    refused_counts: dict[str, int] = {}

    def has(self, index: int) -> bool:
        """Return whether the operation with this index in the batch belongs to the request."""
        return self.first <= index < self.first + self.operations


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message's content, which refers to a payload: `payload` is its S3 key, `digest` the SHA-256 of its header."""

    v: int
    request_id: str
    payload: str
    digest: str
    lanes: int
    source: str


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of outcomes: `applied` by op, `refused` by reason, and the total that `failed`."""

    applied: dict[str, int] = msgspec.field(default_factory=dict)
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    failed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            applied=_added(self.applied, other.applied),
            refused=_added(self.refused, other.refused),
            failed=self.failed + other.failed,
        )

    @property
    def total(self) -> int:
        return sum(self.applied.values()) + sum(self.refused.values()) + self.failed


def _added(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {name: left.get(name, 0) + right.get(name, 0) for name in sorted({*left, *right})}


_IN_ID = "[A-Za-z0-9._:@+=-]"
#: A part of a request id between two slashes: not empty, and not one or two dots.
_PART = rf"(?:\.{{0,2}}[A-Za-z0-9_:@+=-]|\.{{3}}){_IN_ID}*"
REQUEST_ID = re.compile(rf"[A-Za-z0-9]{_IN_ID}*(?:/{_PART})*")
MAX_REQUEST_ID = 200
#: What may follow `{source}:` in a request id.
REST_OF_REQUEST_ID = re.compile(rf"(?:{_IN_ID}+(?:/{_PART})*|(?:/{_PART})+)")
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_request_id(request_id: str) -> str:
    """Return `request_id`, or raise `InvalidRequest` if it cannot be part of an S3 key and of the ledger's keys."""
    if len(request_id) > MAX_REQUEST_ID or not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(
            field="request_id",
            value=request_id,
            expected="1-200 of A-Z a-z 0-9 . _ : / @ + = -, starting with a letter or digit, without empty or dotted parts",
        )
    return request_id


def check_source(source: str) -> str:
    """Return `source`, or raise `InvalidRequest` if it is malformed."""
    if not _SOURCE.fullmatch(source):
        raise InvalidRequest(
            field="source", value=source, expected="1-64 of A-Z a-z 0-9 . _ -, starting with a letter or digit"
        )
    return source
