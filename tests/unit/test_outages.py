"""Failures of AWS while Celery's own tracer runs a task: its message is redelivered, and the task has not failed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Task, chord
from celery.app.trace import build_tracer
from celery.exceptions import Reject
from kombu.message import Message

from mdstore.aws.sqs import Failed
from mdstore.errors import DeliveriesExhausted, DeploymentBroken, ResultNotRecorded, Unavailable
from mdstore.queue.broker.publisher import Unsent
from mdstore.queue.worker.outages import is_redelivered
from mdstore.queue.worker.request import SqsRequest
from tests.unit.canvas import Canvas

pytestmark = pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")  # Celery's text

UNAVAILABLE = Unavailable("throttled", code="Throttled")
BROKEN = DeploymentBroken("no table", code="ResourceNotFoundException")
NOT_RECORDED = ResultNotRecorded("Throttled: throttled")
UNSENT = Unsent([("id", Failed(code="ServiceUnavailable"))], of=1)
NO_QUEUE = Unsent([("id", Failed(code="QueueDoesNotExist", sender_fault=True))], of=1)
REFUSED = Unsent([("id", Failed(id="0", code="InvalidParameterValue", sender_fault=True))], of=1)
OUTAGES = [NOT_RECORDED, UNSENT, NO_QUEUE]


@dataclass
class RecordingChannel:
    """Records what became of a delivery."""

    no_ack_consumers: frozenset[str] = frozenset()
    ended: list[str] = field(default_factory=list)

    def watch(self, *_: Any) -> None:
        pass

    def basic_ack(self, *_: Any, **__: Any) -> None:
        self.ended.append("deleted")

    def basic_reject(self, *_: Any, requeue: bool = False) -> None:
        self.ended.append("redelivered" if requeue else "rejected")

    def dead_letter(self, _: Any, reason: str, *, report: Callable[[], Any] = lambda: None) -> None:
        self.ended.append(f"dead-lettered: {reason.partition(chr(10))[0]}")
        report()


def deliver(canvas: Canvas, sent: Any, *, receives: int = 1, **properties: Any) -> str:
    """Deliver a message to a worker's child and back, as Celery's pool of processes does, and return how the delivery ended."""
    task: Task = canvas.app.tasks[sent.task]
    channel = RecordingChannel()
    fields = vars(sent)
    embed = {name: fields.get(name) for name in ("chord", "chain")}
    headers = {"task": sent.task, "id": sent.task_id, "group": fields.get("group_id"), "receives": receives}
    headers |= {"group_index": fields.get("group_index"), "root_id": sent.task_id}
    message = Message(
        channel=channel, body=json.dumps([sent.args, {}, embed]), delivery_tag="tag", headers=headers,
        content_type="application/json", content_encoding="utf-8", properties={"correlation_id": sent.task_id, **properties},
        delivery_info={"exchange": "", "routing_key": "work"},
    )  # fmt: skip
    request = SqsRequest(message, app=canvas.app, task=task, hostname="here", connection_errors=())
    if not task.acks_late:
        request.acknowledge()
    trace = build_tracer(sent.task, task, app=canvas.app)
    answer = trace(sent.task_id, sent.args, {}, {**request.request_dict, "args": sent.args, **embed})
    traced = pickle.loads(pickle.dumps(answer[0]))  # noqa: S301  as Celery does between processes
    request.on_success((type(answer[1]).__name__ == "TraceInfo", traced, 0.0))
    (ended,) = channel.ended
    return ended


def published_chord(body: Callable[[], Any] = lambda: 1) -> tuple[Canvas, list[Any], Any]:
    """Publish a chord of two parts that run `body`, and return the canvas, the parts' messages and the result."""
    canvas = Canvas()

    def part(number: int) -> Any:  # noqa: ARG001
        return body()

    canvas.app.task(name="part", shared=False)(part)
    result = chord([canvas.s("part", number) for number in range(2)], canvas.s("body"), app=canvas.app).apply_async()
    return canvas, canvas.take("part"), result


@pytest.mark.parametrize("call", ["PutItem", "UpdateItem"])
@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("error", [UNAVAILABLE, BROKEN], ids=["throttled", "no table"])
def test_an_outage_never_fails_a_chord_whose_parts_succeed(call: str, failures: int, error: Exception) -> None:
    """Whichever write of the result or the chord state fails, and however often, the body finally runs with both results."""
    canvas, messages, result = published_chord()
    assert deliver(canvas, messages[0]) == "deleted"
    errors = [error] * failures

    def fail_call(operation: str) -> None:
        if operation == call and errors:
            raise errors.pop()

    canvas.table.before_call = fail_call
    ended = [deliver(canvas, messages[1]) for _ in range(failures + 1)]
    assert ended[-1] == "deleted"
    assert set(ended[:failures]) == {"redelivered"}
    assert result.state == "PENDING"
    (body,) = canvas.take("body")
    assert body.args == [[1, 1]]


def test_a_failure_that_cannot_be_recorded_is_recorded_by_the_next_delivery() -> None:
    """A task that fails while DynamoDB is unavailable is redelivered, fails once DynamoDB is back, and then fails its chord."""

    def fail() -> None:
        raise ValueError("on purpose")

    canvas, messages, result = published_chord(fail)
    assert deliver(canvas, messages[0]) == "deleted"
    errors = [UNAVAILABLE]

    def fail_call(_: str) -> None:
        if errors:
            raise errors.pop()

    canvas.table.before_call = fail_call
    assert [deliver(canvas, messages[1]) for _ in range(2)] == ["redelivered", "deleted"]
    assert result.state == "FAILURE"


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_a_failure_of_the_infrastructure_is_not_a_failure_of_the_task(error: Exception) -> None:
    """The error may leave the task's body, or be the reason for which a retry could not be sent."""
    for raised in (error, Reject(error, requeue=False)):

        def fail(raised: Exception = raised) -> None:
            raise raised

        canvas, messages, result = published_chord(fail)
        assert deliver(canvas, messages[0]) == "redelivered"
        assert canvas.app.AsyncResult(messages[0].task_id).state == "PENDING"
        assert result.state == "PENDING"


def test_an_aws_error_of_the_task_s_own_calls_fails_the_task() -> None:
    """A task whose own call to AWS fails has failed, as in any Celery app."""

    def fail() -> None:
        raise UNAVAILABLE

    canvas, messages, result = published_chord(fail)
    assert [deliver(canvas, one) for one in messages] == ["deleted"] * 2
    assert result.state == "FAILURE"


def test_a_task_acknowledged_early_fails_on_any_error() -> None:
    """Its message is deleted before it runs, so it cannot be redelivered; the task and its chord fail."""

    def fail() -> None:
        raise UNSENT

    canvas, messages, result = published_chord(fail)
    canvas.app.tasks["part"].acks_late = False
    for message in messages:
        deliver(canvas, message)
    assert canvas.app.AsyncResult(messages[0].task_id).state == "FAILURE"
    assert result.state == "FAILURE"


def test_a_task_fails_after_its_last_delivery() -> None:
    """The message is dead-lettered with the reason, and callers that wait get the failure."""

    def fail() -> None:
        raise NOT_RECORDED

    canvas, messages, result = published_chord(fail)
    last = canvas.app.settings.max_receives
    assert [deliver(canvas, one, receives=last) for one in messages] == [
        f"dead-lettered: ResultNotRecorded: Throttled: throttled (delivered {last} times)"
    ] * 2
    assert isinstance(canvas.app.AsyncResult(messages[0].task_id).result, DeliveriesExhausted)
    assert result.state == "FAILURE"


def canvas_with_retry() -> Canvas:
    """Return a canvas with a task that always retries."""
    canvas = Canvas()

    def again(self: Task) -> None:
        raise self.retry(countdown=1)

    canvas.app.task(name="again", shared=False, bind=True)(again)
    return canvas


def test_a_retry_succeeds_even_if_its_state_cannot_be_stored() -> None:
    """The message of the next try is sent already, so the present message is deleted."""
    canvas = canvas_with_retry()
    sent = canvas.app.signature("again").apply_async(task_id="again-1")
    (message,) = canvas.take("again")
    canvas.table.before_call = lambda _: (_ for _ in ()).throw(UNAVAILABLE)
    assert deliver(canvas, message) == "deleted"
    canvas.table.before_call = lambda _: None
    assert len(canvas.take("again")) == 1
    assert sent.state == "PENDING"


def test_a_retry_stays_in_its_message_group() -> None:
    """Fair queues and the order of FIFO queues depend on the message group."""
    canvas = canvas_with_retry()
    canvas.app.signature("again").apply_async(task_id="again-1")
    (message,) = canvas.take("again")
    deliver(canvas, message, MessageGroupId="tenant-3")
    (following,) = canvas.take("again")
    assert following.MessageGroupId == "tenant-3"
    deliver(canvas, message)
    (following,) = canvas.take("again")
    assert "MessageGroupId" not in vars(following)


def test_a_chord_s_body_that_sqs_refuses_fails_the_chord(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQS would refuse it every time. After a temporary failure, the part is redelivered instead."""
    canvas, messages, result = published_chord()
    deliver(canvas, messages[0])
    for error, ended, state in ((UNSENT, "redelivered", "PENDING"), (REFUSED, "deleted", "FAILURE")):

        def fail_to_send(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(canvas.app, "send_task", fail_to_send)
        assert deliver(canvas, messages[1]) == ended
        assert result.state == state
    assert "InvalidParameterValue" in str(result.result)


@pytest.mark.parametrize("error", [*OUTAGES, UNAVAILABLE, BROKEN, REFUSED], ids=repr)
def test_errors_survive_pickling(error: Exception) -> None:
    """They keep all their fields, because the worker's main process decides by them."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert is_redelivered(copy) == is_redelivered(error)
    assert not is_redelivered(ValueError("its own"))
    assert not is_redelivered(REFUSED)
