"""What may happen while messages are delivered: the acts of a schedule, and the faults that answer a call."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mdstore.aws.http import Answer
from mdstore.errors import Unavailable
from tests.model.deliveries import Call, Landing
from tests.model.network import actions_of, failure


class Act(StrEnum):
    """One thing that happens next; which call, message or delivery it happens to is a number beside it."""

    GO = "a call takes effect and is answered"
    START = "a message is delivered, perhaps again"
    BUSY = "a call is answered with: not now"
    LOST = "a call takes effect and its answer is lost"
    LATE = "a call gets no answer, and takes effect some time later, if at all"
    STRAY = "such a call takes effect"
    DIE = "a worker dies before its call takes effect"
    DIE_AFTER = "a worker dies after its call took effect"
    DIE_FLYING = "a worker dies, and its calls take effect some time later"
    TIME_OUT = "a lane's time is over"
    GIVE_UP = "a lane gives up, and its message stays"
    HASTE = "a request is finished, perhaps before its time"
    FORGET = "ten minutes go by, and tokens are forgotten"


@dataclass(frozen=True)
class Step:
    """An act, and what it happens to: number `pick` of what there is, counted round."""

    act: Act
    pick: int = 0


def busy(call: Call, pick: int) -> Landing:
    """One of the ways in which AWS says "not now"."""
    codes = ["ThrottlingException", "InternalServerError"]
    if call.operation == "TransactWriteItems" and pick % 3 == 2:
        contended = [{"Code": "None"} for _ in actions_of(call.body)]
        contended[pick % len(contended)] = {"Code": "TransactionConflict"}
        return failure("TransactionCanceledException", CancellationReasons=contended)
    return failure(codes[pick % 2], status=400 + 100 * (pick % 2))


def no_answer() -> Landing:
    """What a caller gets when there is no answer."""
    return Unavailable("no answer", code="Curl28")


def is_unknown(landing: Landing) -> bool:
    """Whether the same call must be made again, since nothing is known of it."""
    if isinstance(landing, Answer):
        return landing.status >= 500 or b"Throttling" in landing.body or b"TransactionConflict" in landing.body
    return True
