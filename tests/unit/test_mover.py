"""The mover: messages that SQS will never accept, and dead letters that cannot be written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mdstore.aws.sqs import Failed
from mdstore.errors import Unavailable
from mdstore.queue.delayed.mover import MoverStep
from mdstore.queue.delayed.table import DelayedMessage
from tests.unit.fake_sqs import FakeSqs


def delayed(body: str) -> DelayedMessage:
    return DelayedMessage(
        queue="work", body=body, due_at=0.0, deduplication_id=body, group_id=None, delay_seconds=0, key=("hour", body)
    )


@pytest.mark.parametrize("is_broken", [False, True], ids=["dead-lettered", "dead-lettering fails"])
def test_a_message_that_sqs_never_accepts_does_not_block_others(
    is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dead-lettered, or stays in the table if that fails. The other messages of its batch are safe and not sent again."""
    sqs, letters = FakeSqs(), []
    monkeypatch.setattr(sqs, "url", lambda name: name, raising=False)
    sqs.refuse["bad"] = Failed(id="1", code="InvalidMessageContents", sender_fault=True)

    def dead_letter(**letter: Any) -> None:
        if is_broken:
            raise Unavailable("down", code="Down")
        letters.append(letter["body"])

    app = SimpleNamespace(aws=SimpleNamespace(queues=sqs), dead_letter=dead_letter)
    batch = [delayed("a"), delayed("bad"), delayed("b")]
    safe = MoverStep(SimpleNamespace(app=app))._send(batch)
    assert [one.body for one in safe] == (["a", "b"] if is_broken else ["a", "bad", "b"])
    assert letters == ([] if is_broken else ["bad"])
