"""Adapt kombu's SQS transport, so that its calls are batched, run outside the worker's loop and need few permissions.

Queues of tasks are looked up by name and never created or listed at run time. So a role that may look up queues, send,
receive and delete messages, and extend their visibility, is enough. The header `receives` tells a task how often its message
was received, so the task knows its last attempt from its first.

    publish    Channel._put -> SendMessageBatch                        encoding, publisher
    receive    ReceiveMessage -> check -> wait -> the worker's loop    poller, envelope
    settle     acknowledge, reject, requeue -> batched deletes         poller, leases
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from queue import Empty
from typing import Any

from kombu.asynchronous import set_event_loop
from kombu.log import get_logger
from kombu.transport import SQS, virtual

from mdstore.aws.sqs import Failed, Message, Sqs, is_fifo
from mdstore.errors import DeploymentBroken, IntegrityError, InvalidRequest, Unavailable
from mdstore.queue.broker.ascii_json import Decoder
from mdstore.queue.broker.authentication import Authenticator, Unauthenticated, unsigned
from mdstore.queue.broker.claim_check import is_claim, read_claim
from mdstore.queue.broker.encoding import DELAYED, deduplication_id, due_beyond_sqs, entry_of, eta_of
from mdstore.queue.broker.envelope import Malformed, check, task_of
from mdstore.queue.broker.poller import Held, Poller, backoff
from mdstore.queue.broker.publisher import BatchPublisher, Unsent
from mdstore.queue.broker.wakeup import WakeupPipe
from mdstore.queue.control.fanout import FanoutChannel
from mdstore.queue.delayed.table import DelayedTable
from mdstore.queue.small_tasks import SMALL_PER_JOB

logger = get_logger(__name__)

# A forked child inherits the worker's event loop but never runs it, so channels in the child must not use it.
os.register_at_fork(after_in_child=partial(set_event_loop, None))

_TICK = 1.0  # seconds between ticks of the worker's loop
_CLIENT_WAIT = 1.0  # seconds that a client without a loop waits for a message by default
_SOON = 2.0  # seconds: a task that is due within them waits in the worker
_CLOSE_WITHIN = 25.0  # seconds
_GIVE_BACK_WITHIN = 3.0  # seconds

_decode = Decoder[dict[str, Any]]().decode


class QoS(virtual.QoS):
    """Counts the messages that tasks work on. The poller, not kombu, gives them back at shutdown.

    `small` holds the delivery tags of small messages. Others do not wait for them: each process may work on a job of small
    messages, and one more job waits for the first process that is free.
    """

    restore_at_shutdown = False

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self.small: set[str] = set()

    def can_consume(self) -> bool:
        """Return whether there is room for a message that is not small."""
        return (
            not self.prefetch_count or len(self._delivered) - len(self._dirty) - len(self.small) < self.prefetch_count
        )

    def can_consume_small(self) -> bool:
        """Return whether there is room for a small message."""
        return not self.prefetch_count or len(self.small) < (self.prefetch_count + 1) * SMALL_PER_JOB


class Channel(FanoutChannel):
    """Connects kombu to SQS. It reads these transport options besides those of kombu.

    `sqs`, `claim_checks` and `delayed_table` are functions that return the objects of the calling process. `publisher` is the
    app's batch publisher. `admit` raises `Malformed` for a task or a canvas that no message may name. `dead_letter` stores a
    message that must not be executed, with its reason, and `fail_unexecuted` fails its task. `is_small` returns whether a
    task's headers announce small work, which a process does side by side with other small work. `max_receives` is the number of
    the last delivery. `ahead` is how many messages the worker may hold for each one that it can work on at a time. `weights`
    are the queues' shares of a worker.
    """

    QoS = QoS
    body_encoding = "utf-8"  # kombu's default, base64, is a third longer and makes messages unreadable

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._poller: Poller | None = None
        self._at_work: dict[str, Held] = {}
        self._wakeup: WakeupPipe | None = None
        self._ticked_at = time.monotonic()
        self._ticker: Any = None
        self._tasks_on_loop = 0
        self._dead_letter_thread = ThreadPoolExecutor(1, thread_name_prefix="dead letters")

    # -- queues

    def _update_queue_cache(self, queue_name_prefix: str) -> None:
        """Do nothing; kombu would list the account's queues."""

    def _new_queue(self, queue: str, **_: Any) -> str:
        """Return the URL of a queue. Raises `DeploymentBroken` if a queue of tasks was not provisioned."""
        if self.kind_of(queue):
            return super()._new_queue(queue)
        return self._sqs_calls.url(self.canonical_queue_name(queue))

    def queue_url(self, queue: str) -> str:
        """Return the URL of a queue. Raises `DeploymentBroken` if a queue of tasks was not provisioned."""
        return self._new_queue(queue)

    def _size(self, queue: str) -> int:
        body = {"QueueUrl": self._new_queue(queue), "AttributeNames": ["ApproximateNumberOfMessages"]}
        return int(self._sqs_calls.call("GetQueueAttributes", body)["Attributes"]["ApproximateNumberOfMessages"])

    def _purge(self, queue: str) -> int:
        size = self._size(queue)
        self._sqs_calls.call("PurgeQueue", {"QueueUrl": self._new_queue(queue)})
        return size

    @property
    def _sqs_calls(self) -> Sqs:
        sqs: Sqs = self.transport_options["sqs"]()
        return sqs

    # -- publish

    def _put(self, queue: str, message: dict[str, Any], *, now: float | None = None, **_: Any) -> None:
        """Send a message. Its delay is counted from `now`, by default this machine's time."""
        publisher: BatchPublisher = self.transport_options["publisher"]
        dedup_id, due = deduplication_id(message), due_beyond_sqs(queue, message, now=now)
        task_id = str((message.get("headers") or {}).get("id", dedup_id))
        try:
            url = self._new_queue(queue)
            store: Callable[[str], str] = partial(self.claim_checks.store, due=due)
            if (authenticator := self.authenticator) is not None:
                store = partial(_signed, authenticator, self.destination_of(queue), store)
            entry = entry_of(queue, message, store=store, now=now)
            if due is not None:
                table: DelayedTable = self.transport_options["delayed_table"]()
                name = self.canonical_queue_name(queue)
                dedup_id = entry.message_deduplication_id or dedup_id
                table.put(name, entry.message_body, due, deduplication_id=dedup_id, group_id=entry.message_group_id)
                return
        except (Unavailable, DeploymentBroken) as error:
            broken = isinstance(error, DeploymentBroken)
            raise Unsent([(task_id, Failed(code=error.code, message=str(error), sender_fault=broken))], of=1) from error
        publisher.add(url, entry, task_id)

    # -- receive

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, *args: Any, **kwargs: Any
    ) -> None:
        """Start receiving from a queue."""
        self.subscribe_to_topic(queue)
        if no_ack:
            self._noack_queues.add(queue)
        virtual.Channel.basic_consume(self, queue, no_ack, callback, consumer_tag, *args, **kwargs)
        if self._poller is None:
            self._poller = self._new_poller()
        self._poller.consume(queue, self._new_queue(queue), needs_room=not no_ack)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop receiving from a queue, and give back its messages that no task has started."""
        if self.closed:  # a worker that reconnects after an outage cancels the consumers of its old channel
            return
        queue = self._tag_to_queue.get(consumer_tag)
        if queue is not None and self._poller is not None:
            self._poller.cancel(queue)
        super().basic_cancel(consumer_tag)

    def drain_events(self, timeout: float | None = None, callback: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Hand out the next message, for a client without a loop. Raises `Empty` if none arrives within `timeout` seconds."""
        if self._poller is None:
            raise Empty
        wait = _CLIENT_WAIT if timeout is None else timeout
        held = self._take(timeout=wait)
        if held is None:
            raise Empty
        self._hand_out(held)

    def _get(self, queue: str) -> dict[str, Any]:
        """Receive one message for `basic_get`. Raises `Empty` if the queue has none."""
        if self._poller is None:
            self._poller = self._new_poller()
        held = self._poller.fetch(queue, self._new_queue(queue))
        if held is None:
            raise Empty
        self._at_work[held.id] = held
        payload: dict[str, Any] = held.payload
        return payload

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Return one message, or None if the queue has none. With `no_ack`, acknowledge it as well."""
        message = super().basic_get(queue, no_ack, **kwargs)
        if message is not None and no_ack:
            self.basic_ack(message.delivery_tag)
        return message

    def close(self) -> None:
        """Give back held messages, send the deletes that are left, and stop the threads."""
        poller, self._poller = self._poller, None
        self._dead_letter_thread.shutdown(cancel_futures=True)  # the poller gives back the messages of cancelled calls
        if poller is not None:
            poller.close(_CLOSE_WITHIN)
        if self._wakeup is not None:
            self._ticker.cancel()
            self.hub.remove(self._wakeup.fileno())
            self._wakeup.close()
            self._wakeup = None
        super().close()

    def liveness(self) -> dict[str, float]:
        """Return the channel's signs of life, or an empty dict before it consumes.

        `answer`, `receive`, `leases` and `loop` are the seconds since the last SQS response, the last progress of a receive
        and of the lease extender, and the last loop tick; `held` is the number of messages held.
        """
        if self._poller is None:
            return {}
        must_tick = self.hub is not None and self._active_queues and not self._tasks_on_loop
        loop = time.monotonic() - self._ticked_at if must_tick else 0.0
        return {**self._poller.liveness(), "loop": loop, "held": self._poller.count()}

    def give_back(self) -> None:
        """Give back all held messages at once, even those that tasks still work on."""
        if self._poller is not None:
            self._poller.close(_GIVE_BACK_WITHIN, wait=False)

    def _new_poller(self) -> Poller:
        if self.hub is not None:
            self._wakeup = WakeupPipe()
            self.hub.add_reader(self._wakeup.fileno(), self._on_wakeup)
            self._ticker = self.hub.call_repeatedly(_TICK, self._tick)
        return Poller(
            sqs=self._sqs_calls,
            wait_time=self.wait_time_seconds,
            visibility=self.visibility_timeout,
            ahead=int(self.transport_options.get("ahead", 1)),
            room=lambda: int(self.qos.prefetch_count),
            open_message=self._open,
            wake=self._wake,
            is_alive=self._is_alive,
            lost=self._lost,
            is_small=self._is_small,
            weights=self.transport_options.get("weights"),
        )

    def _wake(self) -> None:
        if (wakeup := self._wakeup) is not None:
            wakeup.wake()

    def _on_wakeup(self) -> None:
        if self._wakeup is None or self._poller is None:
            return
        self._wakeup.clear()
        while held := self._take():
            self._hand_out(held)

    def _take(self, *, timeout: float = 0.0) -> Held | None:
        """Take the next message for which there is room."""
        if self._poller is None:
            return None
        qos = self.qos
        return self._poller.take(
            timeout=timeout, only_urgent=not qos.can_consume(), no_small=not qos.can_consume_small()
        )

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()
        self._wake()  # the prefetch count may have grown

    @contextmanager
    def executing(self) -> Iterator[None]:
        """Mark a task as running on the loop, as in a pool without processes or threads: the loop cannot tick meanwhile."""
        self._tasks_on_loop += 1
        try:
            yield
        finally:
            self._tasks_on_loop -= 1
            self._ticked_at = time.monotonic()

    def _is_alive(self) -> bool:
        """Return whether the loop still ticks.

        Without active queues it counts as alive, because at shutdown the loop stops for good while the last tasks still run.
        """
        return (
            self.hub is None
            or self._tasks_on_loop > 0
            or not self._active_queues
            or time.monotonic() - self._ticked_at < max(self.visibility_timeout / 2, 2 * _TICK)
        )

    def _open(self, queue: str, message: Message) -> dict[str, Any] | None:
        """Decode a message, on a receiver's thread. Dead-letter one that no worker may execute, and return None.

        Raises `Unavailable` if its claim cannot be loaded now, or if it cannot be dead-lettered.
        """
        if self.kind_of(queue):
            return self.open_broadcast(queue, message)
        text = message.body
        try:
            text = self.authenticated(queue, message)
            text = self.text_of(text)
            canvas = check(text, received=True)
            payload: dict[str, Any] = _decode(text)
            self.transport_options.get("admit", _admit_all)(payload["headers"]["task"], canvas)
            if self._put_back(queue, message, payload):
                return None
        except Unauthenticated as error:  # it may name another sender's task, so no failure is recorded
            self._discard(message, error)
            return None
        except (Malformed, IntegrityError, InvalidRequest) as error:
            self._refuse(message, text, error)
            return None
        payload["headers"]["receives"] = message.receives
        properties = payload["properties"]
        properties["delivery_tag"] = message.message_id
        route = properties.get("delivery_info")
        properties["delivery_info"] = {
            "exchange": "",
            "priority": 0,
            **(route if isinstance(route, dict) else {}),
            "routing_key": queue,
            "redelivered": message.receives > 1,
        }
        return payload

    def _is_small(self, payload: dict[str, Any]) -> bool:
        """Return whether the work of a decoded message is small."""
        is_small: Callable[[dict[str, Any]], bool] = self.transport_options.get("is_small", _never)
        return is_small(payload["headers"])

    def _refuse(self, message: Message, text: str, error: Exception) -> None:
        """Fail the task of a message that must not be executed, and dead-letter the message. Raises `Unavailable`."""
        fail = self.transport_options.get("fail_unexecuted", _report_to_nobody)
        if not self._report(message, partial(fail, text, error)):
            raise Unavailable("its failure could not be recorded", code="NotRecorded") from error
        self._discard(message, error)

    def _discard(self, message: Message, error: Exception) -> None:
        """Dead-letter a message that must not be executed. Raises `Unavailable`."""
        if not self._store_dead_letter(message, str(error)):
            raise Unavailable("it could not be dead-lettered", code="DeadLetters") from error

    def _report(self, message: Message, report: Callable[[], Any]) -> bool:
        """Report that a task has failed. Return False if this delivery could not, so that the next one should."""
        try:
            report()
        except Exception:
            logger.exception("the failure of the task of message %s could not be recorded", message.message_id)
            return message.receives >= int(self.transport_options.get("max_receives", 1))
        return True

    def _put_back(self, queue: str, message: Message, payload: dict[str, Any]) -> bool:
        """Send a message again, with its delay, if its task is not due yet. Return whether it was sent.

        Celery would hold it in memory until its `eta` by this machine's clock, and take more messages in the meantime. This
        channel delays its own messages until they are due, so only those of other senders are sent again. Raises
        `Unavailable` if a message cannot be sent now.
        """
        eta = eta_of(payload)
        if eta is None:
            return False
        now = self._sqs_calls.server_time()
        left = 0.0 if payload["properties"].get(DELAYED) else max(0.0, eta - now)
        if left <= _SOON:
            here = time.time()
            if eta > here + left:  # this machine's clock is behind
                payload["headers"]["eta"] = datetime.fromtimestamp(here + left, UTC).isoformat()
            return False
        if is_fifo(queue):  # SQS would drop a message with an id that it received less than five minutes ago
            payload["properties"]["MessageDeduplicationId"] = message.message_id
        try:
            self._put(queue, payload, now=now)
        except Unsent as error:
            raise Unavailable(f"it is due in {left:.0f} s, and was not put back: {error}", code="NotPutBack") from error
        return True

    def _hand_out(self, held: Held) -> None:
        """Hand a message to its consumer. If the consumer raises, requeue the message, so that it does not block others."""
        self._ticked_at = time.monotonic()
        callback = self.connection._callbacks.get(held.queue)
        if callback is None:
            if self._poller is not None:
                self._poller.release(held)
            return
        if held.queue not in self._noack_queues:
            self._at_work[held.id] = held
            if held.is_small:
                self.qos.small.add(held.id)
        try:
            callback(held.payload)
        except Exception:
            logger.exception("the consumer of %s failed on a message, which will be redelivered", held.queue)
            self.basic_reject(held.id, requeue=True)

    # -- settle

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:  # noqa: ARG002
        """Queue a message for deletion, and make room for another."""
        held = self._at_work.pop(delivery_tag, None)
        if held is not None and self._poller is not None:
            self._poller.delete(held)
        self._make_room(delivery_tag)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Dead-letter a message or, with `requeue`, give it back. The more often it was received, the longer SQS hides it."""
        if not requeue:
            self.dead_letter(delivery_tag, "rejected")
            return
        held = self._at_work.pop(delivery_tag, None)
        if held is not None and self._poller is not None:
            self._poller.release(held, seconds=backoff(held.message.receives))
        self._make_room(delivery_tag)

    def dead_letter(self, delivery_tag: str, reason: str, *, report: Callable[[], Any] = lambda: None) -> None:
        """On a thread, call `report`, which records the failure, dead-letter the message, and delete it.

        If one of these is impossible, give the message back, so that the next delivery repeats them all. The last delivery
        is dead-lettered even if the failure cannot be recorded.
        """
        held = self._at_work.pop(delivery_tag, None)
        if held is not None and (poller := self._poller) is not None:
            held.is_lost = lambda: False  # the task is over, but the thread still needs the message
            self._dead_letter_thread.submit(self._dead_letter_held, poller, held, reason, report)
        self._make_room(delivery_tag)

    def _dead_letter_held(self, poller: Poller, held: Held, reason: str, report: Callable[[], Any]) -> None:
        if self._report(held.message, report) and self._store_dead_letter(held.message, reason):
            poller.delete(held)
        else:
            poller.release(held, seconds=backoff(held.message.receives))

    def watch(self, delivery_tag: str, owner: Any) -> None:
        """Record the object that works on a message. Once nothing refers to `owner`, the work on the message is lost."""
        if (held := self._at_work.get(delivery_tag)) is not None:
            owner_ref = weakref.ref(owner)
            held.is_lost = lambda: owner_ref() is None

    def _lost(self, held: Held) -> None:
        self._at_work.pop(held.id, None)
        self._make_room(held.id)

    def _make_room(self, delivery_tag: str) -> None:
        self.qos.ack(delivery_tag)
        self.qos.small.discard(delivery_tag)
        self._wake()

    def _store_dead_letter(self, message: Message, reason: str) -> bool:
        """Store a message, exactly as received, in the dead-letter queue. Return False if that fails."""
        try:
            self.transport_options["dead_letter"](
                body=message.body, reason=reason, task=_task_of(message.body), receives=message.receives
            )
        except Exception:  # whatever the error is, the message must be redelivered
            logger.exception("a message could not be dead-lettered: %s", reason)
            return False
        return True


def _signed(authenticator: Authenticator, queue: str, store: Callable[[str], str], text: str) -> str:
    return authenticator.sign(store(text), queue)


def _admit_all(_task: str, _canvas: dict[str, Any]) -> None:
    """Admit every message: without an app, no task is disabled."""


def _never(_headers: dict[str, Any]) -> bool:
    """Return False: without an app, no work is known to be small."""
    return False


def _report_to_nobody(_text: str, _error: Exception) -> None:
    """Do nothing: without an app, there is no result to record."""


def _task_of(body: str) -> str:
    """Return the task that a message or its claim names, or an empty string if it cannot be read."""
    body = unsigned(body)
    try:
        return read_claim(body).task if is_claim(body) else task_of(body)
    except IntegrityError:
        return ""


class Transport(SQS.Transport):
    """Uses this module's channels; everything else is as in kombu's SQS transport."""

    Channel = Channel
    connection_errors = (*SQS.Transport.connection_errors, Unavailable)  # a worker that starts during an outage retries
    implements = SQS.Transport.implements.extend(exchange_type=frozenset(["direct", "topic", "fanout"]))
    polling_interval = None  # `drain_events` itself waits for messages
