"""Commands and events over SNS: names of topics and queues, and the calls that create, subscribe, mark and remove queues.

    topic {namespace}-control   commands to workers   -> queue {namespace}-control-node-{host}-{digest}, one per worker
    no topic                    answers of workers    -> queue {namespace}-control-reply-{id}, one per command
    topic {namespace}-events    events of workers     -> queue {namespace}-events-{digest or name}, one per listener

Topics are provisioned and never created here. A queue lives as long as the process that created it. It has two tags: its
namespace, and when its owner was last seen. By these `mdstore.queue.control.reaper` recognises stale queues.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from hashlib import blake2b
from uuid import uuid4

from botocore.exceptions import ClientError

from mdstore.aws.boto import boto_errors, error_code
from mdstore.aws.clients import AwsClients
from mdstore.aws.sqs import is_gone
from mdstore.settings import Settings

NAMESPACE_TAG, SEEN_TAG = "mdstore:namespace", "mdstore:seen"
REPLY_ID = r"^[0-9a-f]{20}$"
_MAX_NAME = 80  # characters of a queue's name
_ATTRIBUTES = {"MessageRetentionPeriod": "60", "VisibilityTimeout": "30"}
_EXISTS = ("QueueNameExists", "QueueAlreadyExists")


class Kind(StrEnum):
    """Tells what a queue of this module is for."""

    CONTROL = "control"
    REPLY = "reply"
    EVENTS = "events"


class Topics:
    """Calls SNS and SQS for the topics of a namespace and the queues of this process.

    A `queue` is kombu's name of a queue; the name in SQS is always called its SQS name. Calls raise `Unavailable` or
    `DeploymentBroken`. Threads may share an instance; `aws` returns the clients of the calling process.
    """

    def __init__(self, settings: Settings, aws: Callable[[], AwsClients], *, event_queue: str | None = None) -> None:
        """`event_queue` names the queue of this process's event listener, so that a restarted process uses the same queue."""
        self.namespace = settings.namespace
        self.control, self.events = settings.control_topic, settings.events_topic
        self.control_exchange, self.reply_exchange = f"{self.control}.pidbox", f"reply.{self.control}.pidbox"
        self._task_queue = settings.queue
        self._aws = aws
        self._event_queue = event_queue
        # A restarted worker gets a new queue, so that it does not receive commands that were sent to the former process.
        self._instance = uuid4().hex
        self._subscribed: dict[str, str] = {}  # SQS name -> ARN of the subscription

    # -- names

    def kind_of(self, queue: str) -> Kind | None:
        """Return what a queue is for, or None if it is not a queue of this module."""
        if queue.startswith(f"{self.events}."):
            return Kind.EVENTS
        if queue.endswith(f".{self.reply_exchange}"):
            return Kind.REPLY
        return Kind.CONTROL if queue.endswith(f".{self.control_exchange}") else None

    def topic_of(self, exchange: str) -> str | None:
        """Return the topic of an exchange, or None if it has none."""
        return {self.control_exchange: self.control, self.events: self.events}.get(exchange)

    def reply_queue(self, reply_id: str) -> str:
        """Return the queue that receives the answers to a command, by the id that the client gave its reply queue."""
        return f"{reply_id}.{self.reply_exchange}"

    def name_of(self, queue: str) -> str:
        """Return the SQS name of a queue."""
        head, kind = queue.partition(".")[0], self.kind_of(queue)
        if kind is Kind.REPLY:
            return f"{self.control}-reply-{head}"
        digest = blake2b(f"{self._instance}/{queue}".encode(), digest_size=6).hexdigest()
        if kind is Kind.EVENTS:
            return f"{self.events}-{self._event_queue or digest}"
        host = re.sub(r"[^A-Za-z0-9_-]", "-", queue.removesuffix(f".{self.control_exchange}"))
        prefix = f"{self.control}-node-"
        return f"{prefix}{host[: _MAX_NAME - len(prefix) - len(digest) - 1]}-{digest}"

    def url(self, queue: str) -> str:
        """Return the URL of a queue, whether the queue exists or not."""
        return self._url(self.name_of(queue))

    def _url(self, name: str) -> str:
        return f"{self._aws().queues.url(self._task_queue).rpartition('/')[0]}/{name}"

    def _arn(self, service: str, name: str) -> str:
        return self._aws().arn(service, name, queue_url=self._url(name))

    # -- messages

    def publish(self, exchange: str, text: str) -> None:
        """Send a message of at most 256 KiB to all subscribed queues."""
        with boto_errors(f"SNS publish to {self.topic_of(exchange)}"):
            self._aws().sns.publish(TopicArn=self._arn("sns", self.topic_of(exchange) or exchange), Message=text)

    # -- this process's queues

    def create(self, queue: str) -> None:
        """Create a queue. If it exists, set its attributes."""
        name = self.name_of(queue)
        attributes = {**_ATTRIBUTES, **self._policy(queue)}
        sqs = self._aws().sqs
        with boto_errors(f"SQS queue {name}"):
            try:
                sqs.create_queue(QueueName=name, Attributes=attributes, tags=self._tags())  # type: ignore[arg-type]
            except ClientError as error:
                if not error_code(error).endswith(_EXISTS):
                    raise
                sqs.set_queue_attributes(QueueUrl=self._url(name), Attributes=attributes)  # type: ignore[arg-type]

    def subscribe(self, queue: str) -> None:
        """Subscribe a queue to its topic, and mark it as alive. Repeating this is safe."""
        name = self.name_of(queue)
        self.mark_alive(queue)
        with boto_errors(f"SNS subscribe {name}"):
            answer = self._aws().sns.subscribe(
                TopicArn=self._arn("sns", self._topic_for(queue)),
                Protocol="sqs",
                Endpoint=self._arn("sqs", name),
                Attributes={"RawMessageDelivery": "true"},
                ReturnSubscriptionArn=True,
            )
        self._subscribed[name] = answer["SubscriptionArn"]

    def mark_alive(self, queue: str) -> None:
        """Record in the queue's tags that its owner is alive now."""
        name = self.name_of(queue)
        with boto_errors(f"SQS tags of {name}"):
            self._aws().sqs.tag_queue(QueueUrl=self._url(name), Tags=self._tags())

    def remove(self, queue: str) -> None:
        """Delete a queue of this process, and its subscription if it has one."""
        name = self.name_of(queue)
        self.discard(name, self._subscribed.pop(name, None))

    # -- queues of any process

    def subscribed(self) -> Iterator[tuple[str, str]]:
        """Yield SQS name and subscription of each queue of this namespace that is subscribed to a topic."""
        for topic in (self.control, self.events):
            prefix = self._arn("sqs", f"{topic}-")
            for endpoint, subscription in self._subscriptions(topic):
                if endpoint.startswith(prefix):
                    yield endpoint.rpartition(":")[2], subscription

    def listed(self) -> Iterator[str]:
        """Yield the SQS names that look like this namespace's, from `ListQueues`, which a worker's role need not allow."""
        for topic in (self.control, self.events):
            with boto_errors("SQS list"):
                for page in self._aws().sqs.get_paginator("list_queues").paginate(QueueNamePrefix=f"{topic}-"):
                    yield from (url.rpartition("/")[2] for url in page.get("QueueUrls", ()))

    def last_seen(self, name: str) -> float | None:
        """Return when the owner of a queue, given by its SQS name, was last alive, in Unix seconds.

        Return 0 if the queue does not exist, and None if it is not this namespace's.
        """
        with boto_errors(f"SQS tags of {name}"):
            try:
                tags = self._aws().sqs.list_queue_tags(QueueUrl=self._url(name)).get("Tags", {})
            except ClientError as error:
                if is_gone(error_code(error)):
                    return 0.0
                raise
        when = tags.get(SEEN_TAG, "")
        return float(when) if tags.get(NAMESPACE_TAG) == self.namespace and when.isdecimal() else None

    def discard(self, name: str, subscription: str | None) -> None:
        """Delete a queue of any process by its SQS name, after its subscription."""
        if subscription:
            with boto_errors("SNS unsubscribe"):
                self._aws().sns.unsubscribe(SubscriptionArn=subscription)
        with boto_errors(f"SQS delete {name}"):
            try:
                self._aws().sqs.delete_queue(QueueUrl=self._url(name))
            except ClientError as error:
                if not is_gone(error_code(error)):
                    raise

    # -- helpers

    def _topic_for(self, queue: str) -> str:
        return self.events if self.kind_of(queue) is Kind.EVENTS else self.control

    def _tags(self) -> dict[str, str]:
        return {NAMESPACE_TAG: self.namespace, SEEN_TAG: str(int(time.time()))}

    def _policy(self, queue: str) -> dict[str, str]:
        if self.kind_of(queue) is Kind.REPLY:
            return {}
        statement = {
            "Effect": "Allow",
            "Principal": {"Service": "sns.amazonaws.com"},
            "Action": "sqs:SendMessage",
            "Resource": self._arn("sqs", self.name_of(queue)),
            "Condition": {"ArnEquals": {"aws:SourceArn": self._arn("sns", self._topic_for(queue))}},
        }
        return {"Policy": json.dumps({"Version": "2012-10-17", "Statement": [statement]})}

    def _subscriptions(self, topic: str) -> Iterator[tuple[str, str]]:
        with boto_errors(f"SNS subscriptions of {topic}"):
            pages = self._aws().sns.get_paginator("list_subscriptions_by_topic")
            for page in pages.paginate(TopicArn=self._arn("sns", topic)):
                yield from ((one["Endpoint"], one["SubscriptionArn"]) for one in page.get("Subscriptions", ()))
