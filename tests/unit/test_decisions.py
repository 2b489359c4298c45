"""What becomes of a message, as a table: the error that its task raised, and whether this was its last delivery."""

from __future__ import annotations

import pytest

from mdstore.errors import (
    DeploymentBroken,
    IntegrityError,
    InvalidRequest,
    MdstoreError,
    NotFound,
    RequestRejected,
    Unavailable,
)
from mdstore.tasks.decisions import (
    POSTPONED,
    DeadLetter,
    Decision,
    Deliveries,
    Done,
    Pause,
    Postpone,
    Redeliver,
    decide,
)

TABLE: list[tuple[Exception | None, Decision, Decision]] = [
    # error                                              before the last delivery    at the last delivery
    (None,                                               Done(),                     Done()),
    (Unavailable("throttled", code="Throttled"),         Postpone(POSTPONED),        Postpone(POSTPONED)),
    (IntegrityError("forged"),                           DeadLetter("forged"),       DeadLetter("forged")),
    (DeploymentBroken("no table", code="NotFound"),      Pause(gives_up=False),      Pause(gives_up=True)),
    (RequestRejected("malformed", code="Validation"),    Redeliver(gives_up=False),  Redeliver(gives_up=True)),
    (NotFound("request", "r"),                           Redeliver(gives_up=False),  Redeliver(gives_up=True)),
    (InvalidRequest(field="f", value=1, expected="2"),   Redeliver(gives_up=False),  Redeliver(gives_up=True)),
    (MdstoreError("other"),                              Redeliver(gives_up=False),  Redeliver(gives_up=True)),
    (MemoryError(),                                      Redeliver(gives_up=False),  Redeliver(gives_up=True)),
    (KeyError("a bug"),                                  Redeliver(gives_up=False),  Redeliver(gives_up=True)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "before", "last"), TABLE, ids=repr)
def test_the_error_and_the_last_delivery_decide(error: Exception | None, before: Decision, last: Decision) -> None:
    """Only the error's class decides, and only messages that are given back depend on the last delivery."""
    assert [decide(error, Deliveries(count=count, limit=3)) for count in (1, 2)] == [before, before]
    assert [decide(error, Deliveries(count=count, limit=3)) for count in (3, 4)] == [last, last]


def test_a_message_may_be_postponed_any_number_of_times() -> None:
    """Contention is expected, so a postponed message is never given up."""
    assert {decide(Unavailable("no", code="No"), Deliveries(count=count, limit=1)) for count in range(100)} == {
        Postpone(POSTPONED)
    }
