"""Failures that are told for a delivery, and those that are not, in Celery's own tracer and in the channel."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Task, signals
from celery.exceptions import Reject

from mdstore.errors import Unavailable
from mdstore.queue.worker.unexecuted import fail_message, fail_text
from tests.unit.canvas import Canvas
from tests.unit.fake_sqs import FakeSqs
from tests.unit.test_outages import UNAVAILABLE, deliver
from tests.unit.test_transport import DeadLetters, channel, consume, delayed_table, letters, objects, sqs, text
from tests.waiting import until

__all__ = ["channel", "delayed_table", "letters", "objects", "sqs"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")


class Hooked(Task):  # type: ignore[misc]
    """Notes which hooks are called."""

    abstract = True
    called: list[str]

    def on_failure(self, exc: Any, *_: Any) -> None:
        self.called.append(f"on_failure {exc}")

    def after_return(self, status: str, *_: Any) -> None:
        self.called.append(f"after_return {status}")


@pytest.mark.parametrize("fails", [True, False], ids=["a failure", "a success"])
def test_hooks_are_called_for_an_end_that_is_recorded_and_for_no_other(fails: bool) -> None:
    """A delivery during an outage calls neither hooks nor signals; the next one, after it, calls them once."""

    def body() -> int:
        if fails:
            raise ValueError("on purpose")
        return 1

    canvas = Canvas()
    task = canvas.app.task(name="part", shared=False, base=Hooked)(body)
    task.called = []
    heard: list[str] = []

    def listen(exception: Any, **_: Any) -> None:
        heard.append(str(exception))

    signals.task_failure.connect(listen)
    canvas.app.signature("part").apply_async(task_id="part-1")
    (message,) = canvas.take("part")
    message.args = []

    def out(_: str) -> None:
        raise UNAVAILABLE

    canvas.table.before_call = out
    try:
        task.Request = "mdstore.queue.worker.request:SqsRequest"
        assert deliver(canvas, message) == "redelivered"
        assert (task.called, heard) == ([], [])
        canvas.table.before_call = lambda _: None
        assert deliver(canvas, message) == "deleted"
    finally:
        signals.task_failure.disconnect(listen)
    assert task.called == (["on_failure on purpose", "after_return FAILURE"] if fails else ["after_return SUCCESS"])
    assert heard == (["on purpose"] if fails else [])


def test_a_task_that_rejects_its_message_has_failed() -> None:
    """With each version of Celery: 5.6 records nothing itself."""

    def body() -> None:
        raise Reject("not for me", requeue=False)

    canvas = Canvas()
    canvas.app.task(name="part", shared=False)(body)
    sent = canvas.app.signature("part").apply_async(task_id="part-1")
    (message,) = canvas.take("part")
    message.args = []
    assert deliver(canvas, message).startswith("dead-lettered: not for me")
    assert sent.state == "FAILURE"


@pytest.mark.parametrize(
    "headers",
    [
        None,
        7,
        [],
        {},
        {"task": "t"},
        {"id": "x"},
        {"task": 1, "id": "x"},
        {"task": "t", "id": "\udcff"},
        {"task": "t", "id": ""},
    ],
    ids=repr,
)
def test_a_message_without_a_task_s_id_fails_nothing(headers: Any) -> None:
    """There is nobody to tell."""
    canvas = Canvas()
    fail_message(canvas.app, headers, "[[],{},{}]", {}, ValueError("why"))
    assert not canvas.table.items


@pytest.mark.parametrize(
    "message", ["", "7", "[]", "{}", '{"headers": 3}', '{"mdstore-claim": 7}', "\ud800", "[" * 100_000]
)
def test_any_text_may_be_given(message: str) -> None:
    """Whatever it is."""
    canvas = Canvas()
    fail_text(canvas.app, message, ValueError("why"))
    assert not canvas.table.items


@pytest.mark.parametrize(
    "changes", [{"body": 7}, {"body": "!"}, {"properties": 7}, {"body": None}, {"content-type": 7}], ids=repr
)
def test_a_message_with_readable_headers_fails_its_task(changes: dict[str, Any]) -> None:
    """Whatever else is wrong with it."""
    canvas = Canvas()
    properties = {"body_encoding": "base64"}
    message = {"headers": {"task": "t", "id": "x"}, "body": "", "properties": properties, **changes}
    fail_text(canvas.app, json.dumps(message), ValueError("why"))
    assert canvas.app.AsyncResult("x").state == "FAILURE"


@pytest.mark.parametrize(
    "body", ["", "[[],{},7]", '[[],{},{"chord":7,"chain":{},"errbacks":[7]}]', b"\xff", None], ids=repr
)
@pytest.mark.parametrize("index", [0, -1, 10**9, "x"])
def test_what_is_wrong_in_the_rest_does_not_keep_the_failure(body: Any, index: Any) -> None:
    """Only what is valid is used: an index beyond all chords would make as many shards."""
    canvas = Canvas()
    headers = {"task": "t", "id": "x", "group": "g", "group_index": index, "root_id": []}
    fail_message(canvas.app, headers, body, {}, ValueError("why"))
    assert canvas.app.AsyncResult("x").state == "FAILURE"
    assert len(canvas.table.items) == 1


@pytest.mark.parametrize(("receives", "is_kept"), [(1, True), (2, False)])
def test_a_failure_that_cannot_be_recorded_is_recorded_by_the_next_delivery(
    channel: Any,
    sqs: FakeSqs,
    letters: DeadLetters,
    receives: int,
    is_kept: bool,
) -> None:
    """The message stays until its last delivery, and is dead-lettered then, so that no outage loses it."""

    def out(*_: Any) -> None:
        raise Unavailable("throttled", code="Throttled")

    channel.transport_options.update(fail_unexecuted=out, max_receives=2)
    sqs.arrive("url of work", "hello", handle="a", receives=receives)
    sqs.arrive("url of work", text(), handle="b", receives=receives)
    found = consume(channel)
    channel.drain_events(timeout=5)
    channel.dead_letter(found[0].delivery_tag, "why", report=out)
    if is_kept:
        until(lambda: ("b", 5) in sqs.visibility_changes)
        assert letters == []
    else:
        until(lambda: sorted(sqs.all_deleted) == ["a", "b"])
        assert len(letters) == 2
