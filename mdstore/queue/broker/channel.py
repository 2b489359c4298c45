"""kombu's SQS transport with calls of the project's own: batched, off the worker's loop, least privilege.

Queues are named and never created or listed at run time: a role that may send, receive, delete and extend is enough. A
message's receive count travels with it as the header `receives`, so a task can tell its last attempt from its first.

    publish    Channel._put -> SendMessageBatch                        posting, outbox
    receive    ReceiveMessage -> check -> wait -> the worker's loop    courier, envelope
    settle     ack, reject, requeue -> batched deletes                 courier, keeper
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import Empty
from typing import Any

import msgspec
from kombu.asynchronous import set_event_loop
from kombu.log import get_logger
from kombu.transport import SQS, virtual

from mdstore.aws.sqs import Failed, Message, Sqs
from mdstore.errors import DeploymentBroken, IntegrityError, MdstoreError, Unavailable
from mdstore.queue.broker.claim_check import ClaimChecks, is_claim, read_claim
from mdstore.queue.broker.encoding import deduplication_id, due_beyond_sqs, entry_of
from mdstore.queue.broker.envelope import Malformed, check, task_of
from mdstore.queue.broker.poller import Held, Poller, backoff
from mdstore.queue.broker.publisher import BatchPublisher, Unsent
from mdstore.queue.broker.wakeup import WakeupPipe
from mdstore.queue.control.fanout import FanoutChannel
from mdstore.queue.delayed.table import DelayedTable

logger = get_logger(__name__)

# A forked child has a copy of the worker's loop, which nobody turns there; a channel of its own has none.
os.register_at_fork(after_in_child=partial(set_event_loop, None))

_TICK = 1.0  # seconds from one sign of life of the worker's loop to the next
_CLIENT_WAIT = 1.0  # seconds that a client without a loop waits for a message when it does not say
_CLOSE_WITHIN = 25.0  # seconds
_GIVE_BACK_WITHIN = 3.0  # seconds

_decode = msgspec.json.Decoder().decode


class QoS(virtual.QoS):
    """Counts the messages at work; giving them back is the courier's."""

    restore_at_shutdown = False


class Channel(FanoutChannel):
    """Reads transport options of its own.

    `sqs`, `claim_checks` and `delayed_table` return those of the process. `publisher` is the app's. `dead_letter` keeps a
    message that must not be executed, with its reason. `ahead` is how many messages may be held for each one at work.
    """

    QoS = QoS
    body_encoding = "utf-8"  # kombu's base64 is a third longer, and hides what a message says

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._poller: Poller | None = None
        self._at_work: dict[str, Held] = {}
        self._wakeup: WakeupPipe | None = None
        self._ticked_at = time.monotonic()
        self._ticker: Any = None
        self._in_loop = 0
        self._undertaker = ThreadPoolExecutor(1, thread_name_prefix="dead letters")

    # -- queues

    def _update_queue_cache(self, queue_name_prefix: str) -> None:
        """Kombu lists the account's queues here."""

    def _new_queue(self, queue: str, **_: Any) -> str:
        """A queue's URL. Raises `DeploymentBroken` where it was not provisioned."""
        if self.kind_of(queue):
            return super()._new_queue(queue)
        return self._sqs_calls.url(self.canonical_queue_name(queue))

    def _size(self, queue: str) -> int:
        body = {"QueueUrl": self._new_queue(queue), "AttributeNames": ["ApproximateNumberOfMessages"]}
        return int(self._sqs_calls.call("GetQueueAttributes", body)["Attributes"]["ApproximateNumberOfMessages"])

    def _purge(self, queue: str) -> int:
        size = self._size(queue)
        self._sqs_calls.call("PurgeQueue", {"QueueUrl": self._new_queue(queue)})
        return size

    @property
    def _claim_checks(self) -> ClaimChecks:
        claim_checks: ClaimChecks = self.transport_options["claim_checks"]()
        return claim_checks

    @property
    def _sqs_calls(self) -> Sqs:
        sqs: Sqs = self.transport_options["sqs"]()
        return sqs

    # -- publish

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        publisher: BatchPublisher = self.transport_options["publisher"]
        ident, due = deduplication_id(message), due_beyond_sqs(queue, message)
        task_id = str((message.get("headers") or {}).get("id", ident))
        try:
            url = self._new_queue(queue)
            entry = entry_of(queue, message, store=partial(self._claim_checks.store, due=due))
            if due is not None:
                table: DelayedTable = self.transport_options["delayed_table"]()
                name = self.canonical_queue_name(queue)
                ident = entry.message_deduplication_id or ident
                table.put(name, entry.message_body, due, deduplication_id=ident, group_id=entry.message_group_id)
                return
        except (Unavailable, DeploymentBroken) as error:
            broken = isinstance(error, DeploymentBroken)
            raise Unsent([(task_id, Failed(code=error.code, message=str(error), sender_fault=broken))], of=1) from error
        publisher.add(url, entry, task_id)

    # -- receive

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, *args: Any, **kwargs: Any
    ) -> None:
        """Begin to receive a queue."""
        self.subscribe_to_topic(queue)
        if no_ack:
            self._noack_queues.add(queue)
        virtual.Channel.basic_consume(self, queue, no_ack, callback, consumer_tag, *args, **kwargs)
        if self._poller is None:
            self._poller = self._new_poller()
        self._poller.consume(queue, self._new_queue(queue), needs_room=not no_ack)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Receive no more; what no task has begun is given back."""
        if self.closed:  # a worker that tries again after an outage cancels what it had
            return
        queue = self._tag_to_queue.get(consumer_tag)
        if queue is not None and self._poller is not None:
            self._poller.cancel(queue)
        super().basic_cancel(consumer_tag)

    def drain_events(self, timeout: float | None = None, callback: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Hand out the next message, for a client that has no loop. Raises `Empty`."""
        if self._poller is None:
            raise Empty
        wait = _CLIENT_WAIT if timeout is None else timeout
        held = self._poller.take(timeout=wait, only_urgent=not self.qos.can_consume())
        if held is None:
            raise Empty
        self._hand_out(held)

    def _get(self, queue: str) -> dict[str, Any]:
        """One message, for `basic_get`. Raises `Empty`."""
        if self._poller is None:
            self._poller = self._new_poller()
        held = self._poller.fetch(queue, self._new_queue(queue))
        if held is None:
            raise Empty
        self._at_work[held.id] = held
        payload: dict[str, Any] = held.payload
        return payload

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message that is there, or None."""
        message = super().basic_get(queue, no_ack, **kwargs)
        if message is not None and no_ack:
            self.basic_ack(message.delivery_tag)
        return message

    def close(self) -> None:
        """Give back what is held, delete what is done, and end the threads."""
        poller, self._poller = self._poller, None
        self._undertaker.shutdown(cancel_futures=True)  # what was not begun is given back
        if poller is not None:
            poller.close(_CLOSE_WITHIN)
        if self._wakeup is not None:
            self._ticker.cancel()
            self.hub.remove(self._wakeup.fileno())
            self._wakeup.close()
            self._wakeup = None
        super().close()

    def pulse(self) -> dict[str, float]:
        """Seconds since the last `answer` of SQS, return of a `receive`, and round of the `loop`; and how much is `held`."""
        if self._poller is None:
            return {}
        goes_round = self.hub is not None and self._active_queues and not self._in_loop
        loop = time.monotonic() - self._ticked_at if goes_round else 0.0
        return {**self._poller.pulse(), "loop": loop, "held": self._poller.count()}

    def give_back(self) -> None:
        """Give back what is held, whatever is at work on it."""
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
        )

    def _wake(self) -> None:
        if (wakeup := self._wakeup) is not None:
            wakeup.wake()

    def _on_wakeup(self) -> None:
        if self._wakeup is None or self._poller is None:
            return
        self._wakeup.clear()
        while self._poller is not None and (held := self._poller.take(only_urgent=not self.qos.can_consume())):
            self._hand_out(held)

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()
        self._wake()  # there may be more room than there was

    @contextmanager
    def executing(self) -> Iterator[None]:
        """A pool without processes or threads works on the loop, which does not go round meanwhile."""
        self._in_loop += 1
        try:
            yield
        finally:
            self._in_loop -= 1
            self._ticked_at = time.monotonic()

    def _is_alive(self) -> bool:
        """Whether the loop goes round; it stops for good when the worker shuts down and only its tasks go on."""
        return (
            self.hub is None
            or self._in_loop > 0
            or not self._active_queues
            or time.monotonic() - self._ticked_at < max(self.visibility_timeout / 2, 2 * _TICK)
        )

    def _open(self, queue: str, message: Message) -> dict[str, Any] | None:
        """Read a message, on a receiver's thread; one that no worker may execute is dead-lettered, and None returned."""
        if self.kind_of(queue):
            return self.open_broadcast(queue, message)
        try:
            text = self._claim_checks.load(message.body) if is_claim(message.body) else message.body
            check(text, received=True)
        except (Malformed, IntegrityError) as error:
            if not self._dead_letter(message, str(error)):
                raise Unavailable("it could not be dead-lettered", code="DeadLetters") from error
            return None
        payload: dict[str, Any] = _decode(text)
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

    def _hand_out(self, held: Held) -> None:
        """Hand a message to its consumer. One that breaks on its way must not take others with it, nor hold its place."""
        self._ticked_at = time.monotonic()
        callback = self.connection._callbacks.get(held.queue)
        if callback is None:
            if self._poller is not None:
                self._poller.release(held)
            return
        if held.queue not in self._noack_queues:
            self._at_work[held.id] = held
        try:
            callback(held.payload)
        except Exception:
            logger.exception("a message of %s cannot be taken; it comes again", held.queue)
            self.basic_reject(held.id, requeue=True)

    # -- settle

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:  # noqa: ARG002
        """Delete a message soon, and make room for another."""
        held = self._at_work.pop(delivery_tag, None)
        if held is not None and self._poller is not None:
            self._poller.delete(held)
        self._make_room(delivery_tag)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give a message back, to come again the later the more often it has come; or dead-letter it."""
        if not requeue:
            self.bury(delivery_tag, "rejected")
            return
        held = self._at_work.pop(delivery_tag, None)
        if held is not None and self._poller is not None:
            self._poller.release(held, seconds=backoff(held.message.receives))
        self._make_room(delivery_tag)

    def bury(self, delivery_tag: str, reason: str, *, then: Callable[[], Any] | None = None) -> None:
        """Dead-letter a message on a thread, delete it, and call `then`; where that is not to be had, it comes again."""
        held = self._at_work.pop(delivery_tag, None)
        if held is not None and (poller := self._poller) is not None:
            held.is_lost = lambda: False  # nobody works on it any more, and still it is in good hands
            self._undertaker.submit(self._bury, poller, held, reason, then)
        self._make_room(delivery_tag)

    def _bury(self, poller: Poller, held: Held, reason: str, then: Callable[[], Any] | None) -> None:
        if not self._dead_letter(held.message, reason):
            poller.release(held, seconds=backoff(held.message.receives))
            return
        poller.delete(held)
        try:
            if then is not None:
                then()
        except Exception:
            logger.exception("message %s is dead-lettered, and nobody was told", held.id)

    def watch(self, delivery_tag: str, worker: Any) -> None:
        """Note who works on a message: when nobody refers to `worker` any more, its work is lost."""
        if (held := self._at_work.get(delivery_tag)) is not None:
            worker_of = weakref.ref(worker)
            held.is_lost = lambda: worker_of() is None

    def _lost(self, held: Held) -> None:
        self._at_work.pop(held.id, None)
        self._make_room(held.id)

    def _make_room(self, delivery_tag: str) -> None:
        self.qos.ack(delivery_tag)
        self._wake()

    def _dead_letter(self, message: Message, reason: str) -> bool:
        """Keep a message, as it came, among the dead letters; False where that is not to be had."""
        try:
            self.transport_options["dead_letter"](
                body=message.body, reason=reason, task=_task_of(message.body), receives=message.receives
            )
        except MdstoreError:
            logger.exception("a message could not be dead-lettered: %s", reason)
            return False
        return True


def _task_of(body: str) -> str:
    """The task that a message, or its claim, names; empty where that cannot be read."""
    try:
        return read_claim(body).task if is_claim(body) else task_of(body)
    except IntegrityError:
        return ""


class Transport(SQS.Transport):
    """The transport."""

    Channel = Channel
    connection_errors = (*SQS.Transport.connection_errors, Unavailable)  # a worker that begins in an outage tries again
    implements = SQS.Transport.implements.extend(exchange_type=frozenset(["direct", "topic", "fanout"]))
    polling_interval = None  # a client waits inside of `drain_events`
