"""The acts of a schedule: what may happen while messages are delivered, and the faults that answer a call."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mdstore.aws.http import Response
from mdstore.errors import Unavailable
from tests.model.deliveries import Call, CallResult
from tests.model.network import actions_of, failure


class Act(StrEnum):
    """What happens next. A `Step` adds the number of the call, message or delivery that it happens to."""

    GO = "a call takes effect and is answered"
    START = "a message is delivered, perhaps again"
    BUSY = "a call is answered with 'not now'"
    LOST = "a call takes effect and its answer is lost"
    LATE = "a call gets no answer, and may take effect later"
    LATE_EFFECT = "a late call takes effect"
    DIE = "a worker dies before its call takes effect"
    DIE_AFTER = "a worker dies after its call took effect"
    DIE_CALLING = "a worker dies, and its calls may take effect later"
    TIME_OUT = "a lane exceeds its time budget"
    GIVE_UP = "a lane gives up, and its message is kept"
    FINISH_EARLY = "finish runs, perhaps before the last lane is done"
    FORGET = "ten minutes pass, and DynamoDB forgets its tokens"


@dataclass(frozen=True)
class Step:
    """An act, and what it happens to: candidate number `pick`, modulo the number of candidates."""

    act: Act
    pick: int = 0


def busy(call: Call, pick: int) -> CallResult:
    """Return one of the answers with which AWS says "not now"."""
    codes = ["ThrottlingException", "InternalServerError"]
    if call.operation == "TransactWriteItems" and pick % 3 == 2:
        contended = [{"Code": "None"} for _ in actions_of(call.body)]
        contended[pick % len(contended)] = {"Code": "TransactionConflict"}
        return failure("TransactionCanceledException", CancellationReasons=contended)
    return failure(codes[pick % 2], status=400 + 100 * (pick % 2))


def no_answer() -> CallResult:
    """Return what a caller gets when there is no answer."""
    return Unavailable("no answer", code="Curl28")


def must_repeat(result: CallResult) -> bool:
    """Return whether the writer must repeat the call unchanged, because it did not take effect or may not have."""
    if isinstance(result, Response):
        return result.status >= 500 or b"Throttling" in result.body or b"TransactionConflict" in result.body
    return True
