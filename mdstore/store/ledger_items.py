"""What the ledger knows of requests, lanes and transactions, and the form in which its items hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mdstore.model import FINAL_STATES, Counts, Reference, Refusal, State

_MOST_DOUBLINGS = 12  # by then, a lease of a few minutes exceeds the 14 days that SQS keeps a message


class LaneSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one lane. `state` is completed or failed, `error` says why it failed, and times are in Unix seconds."""

    lane: int
    state: State
    counts: Counts
    started_at: float
    finished_at: float
    error: str = ""


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A request's state. Times are in Unix seconds.

    `early` counts the operations that were refused before the request was published. `counts` covers all lanes once the state
    is final. `started_by` is the id of the task that started it. `sent_again` counts how often it was sent again.
    `active_at` is the last sign of work; lanes count only where their summaries were read. `content` is the digest of the
    operations; items of release 0.1.0 have none. In a batch, `reference` is that of the batch, without a digest until the
    request is completed. `is_follow_up` means that the message of another task sends the request, if that task succeeds.
    """

    request_id: str
    state: State
    source: str
    operations: int
    lanes: int
    reference: Reference
    early: Counts
    counts: Counts
    accepted_at: float
    started_at: float | None = None
    finished_at: float | None = None
    error: str = ""
    started_by: str = ""
    sent_again: int = 0
    active_at: float = 0.0
    content: str = ""
    is_follow_up: bool = False

    @property
    def is_batched(self) -> bool:
        """Return whether the request is one of a batch."""
        return self.reference.request_id != self.request_id

    def is_abandoned(self, now: float, lease: float) -> bool:
        """Return whether the request is abandoned and must be sent again: it failed, or its lease is over.

        Without a sign of work, the messages may be lost, or may wait in a long queue. So the lease doubles each time the
        request is sent again, which keeps a long queue from filling with copies.
        """
        if self.state in FINAL_STATES:
            return self.state is State.FAILED
        doublings = min(self.sent_again, _MOST_DOUBLINGS)
        return now - self.active_at > lease * (1 << doublings)

    def summary(self) -> dict[str, Any]:
        """Return the result of the `ingest` task: JSON scalars and two small maps."""
        counts = self.counts
        return {
            "request_id": self.request_id,
            "state": str(self.state),
            "operations": self.operations,
            "applied": sum(counts.applied.values()),
            "refused": sum(counts.refused.values()),
            "failed": counts.failed,
            "applied_by_op": counts.applied,
            "refused_by_reason": counts.refused,
        }


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The proof that transaction `number` of a lane applied all of its operations except the `refused` ones."""

    number: int
    refused: tuple[Refusal, ...] = ()


def receipt_key(request_id: str, lane: int, number: int) -> dict[str, str]:
    """Return the primary key of a receipt."""
    return {"pk": f"{request_id}#{lane:05d}", "sk": f"tx#{number:05d}"}


def receipt_of(item: Mapping[str, Any]) -> Receipt:
    """Read a receipt from its item."""
    number = int(item["sk"].removeprefix("tx#"))
    return Receipt(number=number, refused=tuple(msgspec.convert(item.get("refused", []), list[Refusal])))


def request_values(reference: Reference, operations: int, refused: Mapping[str, int]) -> dict[str, Any]:
    return {**counted_values(operations, refused), "reference": msgspec.to_builtins(reference)}


def counted_values(operations: int, refused: Mapping[str, int]) -> dict[str, Any]:
    return {"operations": operations, "early": counts_value(Counts(refused=dict(refused)))}


def request_of(item: Mapping[str, Any]) -> RequestStatus:
    reference = msgspec.convert(item["reference"], Reference)
    early = msgspec.convert(item["early"], Counts)
    return RequestStatus(
        request_id=item["pk"],
        state=State(item["state"]),
        source=reference.source,
        operations=item["operations"],
        lanes=reference.lanes,
        reference=reference,
        early=early,
        counts=msgspec.convert(item["counts"], Counts) if "counts" in item else early,
        accepted_at=item["accepted_at"] / 1000,
        started_at=item["started_at"] / 1000 if "started_at" in item else None,
        finished_at=item["finished_at"] / 1000 if "finished_at" in item else None,
        error=item.get("error", ""),
        started_by=item.get("started_by", ""),
        sent_again=item.get("sent_again", 0),
        active_at=max(item.get(name, 0) for name in ("accepted_at", "sent_at", "started_at")) / 1000,
        content=item.get("content", ""),
        is_follow_up=item.get("is_follow_up", False),
    )


def lane_of(item: Mapping[str, Any]) -> LaneSummary:
    return LaneSummary(
        lane=int(item["sk"].removeprefix("lane#")),
        state=State(item["state"]),
        counts=msgspec.convert(item["counts"], Counts),
        started_at=item["started_at"] / 1000,
        finished_at=item["finished_at"] / 1000,
        error=item.get("error", ""),
    )


def counts_value(counts: Counts) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(counts)
    return value


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
