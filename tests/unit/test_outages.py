"""AWS fails a task, in Celery's own tracer: its message comes again, and nobody is told that it failed."""

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
from mdstore.queue.worker.outages import comes_again
from mdstore.queue.worker.request import SqsRequest
from tests.unit.canvas import Canvas

pytestmark = pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")  # Celery's word for it

UNAVAILABLE = Unavailable("throttled", code="Throttled")
BROKEN = DeploymentBroken("no table", code="ResourceNotFoundException")
NOT_RECORDED = ResultNotRecorded("Throttled: throttled")
UNSENT = Unsent([("id", Failed(code="ServiceUnavailable"))], of=1)
NO_QUEUE = Unsent([("id", Failed(code="QueueDoesNotExist", sender_fault=True))], of=1)
REFUSED = Unsent([("id", Failed(id="0", code="InvalidParameterValue", sender_fault=True))], of=1)
OUTAGES = [NOT_RECORDED, UNSENT, NO_QUEUE]


@dataclass
class NotedChannel:
    """What became of a delivery."""

    no_ack_consumers: frozenset[str] = frozenset()
    ended: list[str] = field(default_factory=list)

    def watch(self, *_: Any) -> None:
        pass

    def basic_ack(self, *_: Any, **__: Any) -> None:
        self.ended.append("deleted")

    def basic_reject(self, *_: Any, requeue: bool = False) -> None:
        self.ended.append("comes again" if requeue else "rejected")

    def dead_letter(self, _: Any, reason: str, *, report: Callable[[], Any] = lambda: None) -> None:
        self.ended.append(f"dead-lettered: {reason.partition(chr(10))[0]}")
        report()


def deliver(canvas: Canvas, sent: Any, *, receives: int = 1, **properties: Any) -> str:
    """One delivery of a message to a worker's child and back, as in Celery's pool of processes; returns how it ended."""
    task: Task = canvas.app.tasks[sent.task]
    channel = NotedChannel()
    known = vars(sent)
    embed = {name: known.get(name) for name in ("chord", "chain")}
    headers = {"task": sent.task, "id": sent.task_id, "group": known.get("group_id"), "receives": receives}
    headers |= {"group_index": known.get("group_index"), "root_id": sent.task_id}
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
    traced = pickle.loads(pickle.dumps(answer[0]))  # noqa: S301  as between processes
    request.on_success((type(answer[1]).__name__ == "TraceInfo", traced, 0.0))
    (ended,) = channel.ended
    return ended


def made(body: Callable[[], Any] = lambda: 1) -> tuple[Canvas, list[Any], Any]:
    """A chord of two parts that run `body`, published."""
    canvas = Canvas()

    def part(number: int) -> Any:  # noqa: ARG001
        return body()

    canvas.app.task(name="part", shared=False)(part)
    result = chord([canvas.s("part", number) for number in range(2)], canvas.s("body"), app=canvas.app).apply_async()
    return canvas, canvas.take("part"), result


@pytest.mark.parametrize("call", ["PutItem", "UpdateItem"])
@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("error", [UNAVAILABLE, BROKEN], ids=["throttled", "no table"])
def test_a_part_that_succeeded_never_fails_its_chord(call: str, failures: int, error: Exception) -> None:
    """Whatever of its result and its note cannot be written, and for how long: at last the body runs with both results."""
    canvas, messages, result = made()
    assert deliver(canvas, messages[0]) == "deleted"
    left = [error] * failures

    def turn(operation: str) -> None:
        if operation == call and left:
            raise left.pop()

    canvas.table.turn = turn
    ended = [deliver(canvas, messages[1]) for _ in range(failures + 1)]
    assert ended[-1] == "deleted"
    assert set(ended[:failures]) == {"comes again"}
    assert result.state == "PENDING"
    (body,) = canvas.take("body")
    assert body.args == [[1, 1]]


def test_a_failure_that_cannot_be_noted_is_noted_by_the_next_delivery() -> None:
    """A task that fails while DynamoDB is out has failed when it is there again, and so has its chord."""

    def fail() -> None:
        raise ValueError("on purpose")

    canvas, messages, result = made(fail)
    assert deliver(canvas, messages[0]) == "deleted"
    left = [UNAVAILABLE]

    def turn(_: str) -> None:
        if left:
            raise left.pop()

    canvas.table.turn = turn
    assert [deliver(canvas, messages[1]) for _ in range(2)] == ["comes again", "deleted"]
    assert result.state == "FAILURE"


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_what_aws_fails_is_no_failure(error: Exception) -> None:
    """As it leaves the body, or as the reason for which a retry could not be sent."""
    for raised in (error, Reject(error, requeue=False)):

        def fail(raised: Exception = raised) -> None:
            raise raised

        canvas, messages, result = made(fail)
        assert deliver(canvas, messages[0]) == "comes again"
        assert canvas.app.AsyncResult(messages[0].task_id).state == "PENDING"
        assert result.state == "PENDING"


def test_what_the_body_gets_from_aws_is_its_own_affair() -> None:
    """A task that asks AWS for something, and fails as it gets nothing, has failed, as in any Celery."""

    def fail() -> None:
        raise UNAVAILABLE

    canvas, messages, result = made(fail)
    assert [deliver(canvas, one) for one in messages] == ["deleted"] * 2
    assert result.state == "FAILURE"


def test_a_message_that_is_gone_does_not_come_again() -> None:
    """A task that is acknowledged before it runs has failed, and its chord, whatever it was that failed it."""

    def fail() -> None:
        raise UNSENT

    canvas, messages, result = made(fail)
    canvas.app.tasks["part"].acks_late = False
    for message in messages:
        deliver(canvas, message)
    assert canvas.app.AsyncResult(messages[0].task_id).state == "FAILURE"
    assert result.state == "FAILURE"


def test_after_the_last_delivery_it_has_failed() -> None:
    """The message is dead-lettered with its reason, and who waits is told."""

    def fail() -> None:
        raise NOT_RECORDED

    canvas, messages, result = made(fail)
    last = canvas.app.settings.max_receives
    assert [deliver(canvas, one, receives=last) for one in messages] == [
        f"dead-lettered: ResultNotRecorded: Throttled: throttled (delivered {last} times)"
    ] * 2
    assert isinstance(canvas.app.AsyncResult(messages[0].task_id).result, DeliveriesExhausted)
    assert result.state == "FAILURE"


def trying() -> Canvas:
    """With a task that is tried again."""
    canvas = Canvas()

    def again(self: Task) -> None:
        raise self.retry(countdown=1)

    canvas.app.task(name="again", shared=False, bind=True)(again)
    return canvas


def test_a_retry_whose_state_cannot_be_stored_is_a_retry() -> None:
    """The next try's message is on its way: this one has done its part."""
    canvas = trying()
    sent = canvas.app.signature("again").apply_async(task_id="again-1")
    (message,) = canvas.take("again")
    canvas.table.turn = lambda _: (_ for _ in ()).throw(UNAVAILABLE)
    assert deliver(canvas, message) == "deleted"
    canvas.table.turn = lambda _: None
    assert len(canvas.take("again")) == 1
    assert sent.state == "PENDING"


def test_a_retry_stays_in_its_message_group() -> None:
    """Fair queues and the order of FIFO queues go by it."""
    canvas = trying()
    canvas.app.signature("again").apply_async(task_id="again-1")
    (message,) = canvas.take("again")
    deliver(canvas, message, MessageGroupId="tenant-3")
    (following,) = canvas.take("again")
    assert following.MessageGroupId == "tenant-3"
    deliver(canvas, message)
    (following,) = canvas.take("again")
    assert "MessageGroupId" not in vars(following)


def test_a_body_that_sqs_refuses_for_what_it_is_fails_its_chord(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be refused each time; what may pass is tried again instead."""
    canvas, messages, result = made()
    deliver(canvas, messages[0])
    for error, ended, state in ((UNSENT, "comes again", "PENDING"), (REFUSED, "deleted", "FAILURE")):

        def sending(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(canvas.app, "send_task", sending)
        assert deliver(canvas, messages[1]) == ended
        assert result.state == state
    assert "InvalidParameterValue" in str(result.result)


@pytest.mark.parametrize("error", [*OUTAGES, UNAVAILABLE, BROKEN, REFUSED], ids=repr)
def test_errors_go_from_process_to_process(error: Exception) -> None:
    """With all that they say: the worker's main process decides by them."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert comes_again(copy) == comes_again(error)
    assert not comes_again(ValueError("its own"))
    assert not comes_again(REFUSED)
