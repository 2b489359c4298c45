"""The corpus of one version: its files, their loading into an emulator, and the environment in which it is replayed.

A directory is named for the version whose code wrote it, and holds:

    about.json       when it was recorded
    messages.json    bodies and attributes of SQS messages, by namespace and name
    broadcasts.json  what was published to the control and event topics
    objects.json     S3 objects by namespace and key, as parts that are text or base64
    items.json       items of the tables `records`, `ledger`, `results`, `due` by namespace, in DynamoDB JSON
    requests.json    the operations of requests, so that they can be sent again
    expected.json    what a reader must find, and what becomes of messages; written by hand or read from AWS with boto3

There are two namespaces: `compat-store` is the data store's, `compat-shop` that of a plain Celery app.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from boto3.session import Session

# The replay's only imports of modules that the package does not make public.
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.compat.clock import (
    Item,
    Move,
    fresh_command,
    moved_due_item,
    moved_item,
    moved_payloads,
    with_digests,
    with_etas,
)
from tests.compat.shop import fifo
from tests.waiting import until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STORE, SHOP = "compat-store", "compat-shop"
SHOP_NODE = "shop@compat"
TABLES = ("records", "ledger", "results", "due")
_LONG = 1_000  # characters of a repeated one that are not written out


# -- values


def to_json(value: Any) -> Any:
    """Write what JSON has no words for: decimals, bytes, and a long text that repeats one character."""
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Decimal):
        return {"$number": str(value)}
    if isinstance(value, bytes):
        return {"$base64": base64.b64encode(value).decode()}
    if isinstance(value, str) and len(value) > _LONG and len(set(value)) == 1:
        return {"$repeat": value[0], "times": len(value)}
    return value


def from_json(value: Any) -> Any:
    """Read what `to_json` wrote."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$number" in value:
        return Decimal(value["$number"])
    if "$base64" in value:
        return base64.b64decode(value["$base64"])
    if "$repeat" in value:
        return value["$repeat"] * value["times"]
    return {name: from_json(item) for name, item in value.items()}


def exact(value: Any) -> Any:
    """Make values comparable without Python's leniency: `True` is not 1, and a number is its exact value."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    return "number", Decimal(str(value))


def parts_of(content: bytes) -> list[Any]:
    """Split an object into parts that can be reviewed: a payload's header is text, the rest is bytes."""
    if not content.startswith(b"MDS1"):
        return [content]
    end = 8 + int.from_bytes(content[4:8], "big")
    return [content[:8], content[8:end].decode(), content[end:]]


def _joined(parts: list[Any]) -> bytes:
    return b"".join(part.encode() if isinstance(part, str) else part for part in parts)


# -- files


@dataclass(frozen=True, kw_only=True)
class Letter:
    """A message of SQS as it was sent. `group` and `deduplication` are of FIFO queues, `group` also of fair ones."""

    queue: str
    body: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None
    deduplication: str | None = None

    def sent_again(self, queue: str) -> Letter:
        """Make of a dead letter the message that it was."""
        return Letter(queue=queue, body=self.body)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus as it is loaded: `objects` and `items` by namespace, the items by table."""

    version: str
    messages: dict[str, dict[str, Letter]]
    broadcasts: dict[str, str]
    objects: dict[str, dict[str, bytes]]
    items: dict[str, dict[str, list[Item]]]
    requests: dict[str, dict[str, Any]]
    expected: dict[str, Any]

    @classmethod
    def load(cls, directory: Path, *, whole: bool) -> Corpus:
        """Read a directory and move its times to the present; unless `whole`, only what would expire is moved."""
        about = _read(directory / "about.json")
        move = Move.to_present(about["recorded_at"], time.time(), whole=whole)
        objects: dict[str, dict[str, bytes]] = {}
        digests: dict[str, str] = {}

        def moved_text(text: str) -> str:
            return with_etas(with_digests(text, digests), move)

        for namespace, found in _read(directory / "objects.json").items():
            contents = {key: _joined(parts) for key, parts in found.items()}
            objects[namespace], changed = moved_payloads(contents, move)
            digests |= changed
        items = _read(directory / "items.json", moved_text)
        movers = {"due": moved_due_item}
        return cls(
            version=directory.name,
            messages={
                namespace: {name: Letter(**letter) for name, letter in letters.items()}
                for namespace, letters in _read(directory / "messages.json", moved_text).items()
            },
            broadcasts=_read(directory / "broadcasts.json"),
            objects=objects,
            items={
                namespace: {
                    table: [movers.get(table, moved_item)(item, move) for item in found]
                    for table, found in tables.items()
                }
                for namespace, tables in items.items()
            },
            requests=_read(directory / "requests.json"),
            expected=_read(directory / "expected.json"),
        )


def versions() -> list[Path]:
    """Find the directories of all versions."""
    found = sorted(path.parent for path in HERE.glob("*/about.json"))
    assert found, "a replay of nothing would be skipped"
    return found


def replays(directory: Path) -> list[str]:
    """List the replays of messages that a version's corpus has."""
    return list(_read(directory / "expected.json")["replays"])


def write(path: Path, value: Any) -> None:
    """Write a file of a corpus."""
    path.write_text(json.dumps(to_json(value), indent=1) + "\n", encoding="ascii")


def _read(path: Path, moved: Callable[[str], str] = str) -> Any:
    return from_json(json.loads(moved(path.read_text(encoding="ascii"))))


# -- environment


class Environment:
    """A provisioned namespace in an emulator, seen through boto3, and the processes that are started in it."""

    def __init__(self, url: str, namespace: str, directory: Path) -> None:
        self.namespace = namespace
        self.notes = directory / f"{namespace}.notes"
        self._directory = directory
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MDSTORE_", "AWS_"))}
        self.environ = {
            **inherited,
            "AWS_ENDPOINT_URL": url,
            "MDSTORE_NAMESPACE": namespace,
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_API_PORT": str(free_port()),
            "NOTES": str(self.notes),
        }
        self.settings = load_settings(self.environ).settings
        for _ in provision(self.settings):
            pass
        session = Session(aws_access_key_id="local", aws_secret_access_key="local", region_name="us-east-1")
        self.dynamodb = session.client("dynamodb", endpoint_url=url)
        self.s3 = session.client("s3", endpoint_url=url)
        self.sqs = session.client("sqs", endpoint_url=url)
        self.sns = session.client("sns", endpoint_url=url)

    def settings_with(self, **environ: str) -> Any:
        """Read the settings, some of them changed."""
        return load_settings({**self.environ, **environ}).settings

    def make_fifo(self) -> None:
        """Make the FIFO queue beside the namespace's own."""
        self.sqs.create_queue(QueueName=fifo(self.namespace), Attributes={"FifoQueue": "true"})

    def load(self, corpus: Corpus, namespace: str) -> None:
        """Put a namespace of a corpus into this one: objects and items, but no messages."""
        for key, content in corpus.objects[namespace].items():
            self.s3.put_object(Bucket=self.settings.bucket, Key=key, Body=content)
        for table, items in corpus.items[namespace].items():
            for item in items:
                self.dynamodb.put_item(TableName=self.table(table), Item=item)

    def table(self, kind: str) -> str:
        """Name the table of one kind."""
        setting = "delayed" if kind == "due" else kind  # the corpus keeps the name under which 0.1.0 knew the table
        name: str = getattr(self.settings, f"{setting}_table")
        return name

    def items(self, kind: str) -> list[Item]:
        """Read all items of a table, sorted."""
        pages = self.dynamodb.get_paginator("scan").paginate(TableName=self.table(kind), ConsistentRead=True)
        return sorted((dict(item) for page in pages for item in page["Items"]), key=repr)

    def send(self, *letters: Letter) -> None:
        """Deliver messages as they were recorded."""
        for letter in letters:
            options: dict[str, Any] = {}
            if letter.attributes:
                options["MessageAttributes"] = letter.attributes
            if letter.group:
                options["MessageGroupId"] = letter.group
            if letter.deduplication:
                options["MessageDeduplicationId"] = letter.deduplication
            self.sqs.send_message(QueueUrl=self.url(letter.queue), MessageBody=letter.body, **options)

    def receive(self, queue: str, *, count: int = 1) -> list[Letter]:
        """Wait for `count` messages and take them from their queue."""
        found: list[Letter] = []

        def received() -> bool:
            answer = self.sqs.receive_message(
                QueueUrl=self.url(queue),
                MaxNumberOfMessages=min(10, count - len(found)),
                WaitTimeSeconds=1,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            )
            for message in answer.get("Messages", []):
                system = message.get("Attributes", {})
                attributes = {
                    name: {key: one[key] for key in ("DataType", "StringValue") if key in one}
                    for name, one in message.get("MessageAttributes", {}).items()
                }
                found.append(
                    Letter(
                        queue=queue,
                        body=message["Body"],
                        attributes=attributes,
                        group=system.get("MessageGroupId"),
                        deduplication=system.get("MessageDeduplicationId"),
                    )
                )
                self.sqs.delete_message(QueueUrl=self.url(queue), ReceiptHandle=message["ReceiptHandle"])
            return len(found) >= count

        until(received, within=30, what=f"{count} messages of {queue}")
        return found

    def url(self, queue: str) -> str:
        """Find a queue's URL."""
        return self.sqs.get_queue_url(QueueName=queue)["QueueUrl"]

    def is_idle(self) -> bool:
        """Tell whether no message waits and none is worked on."""
        names: list[Any] = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self.sqs.get_queue_attributes(QueueUrl=self.url(self.settings.queue), AttributeNames=names)
        return all(answer["Attributes"][name] == "0" for name in names)

    def topic(self, name: str) -> str:
        """Find a topic's ARN."""
        topics = self.sns.get_paginator("list_topics").paginate()
        return next(
            one["TopicArn"] for page in topics for one in page["Topics"] if one["TopicArn"].endswith(f":{name}")
        )

    def publish_command(self, text: str) -> None:
        """Publish a command to workers, as fresh as it was when it was recorded."""
        self.sns.publish(TopicArn=self.topic(self.settings.control_topic), Message=fresh_command(text, time.time()))

    def publish_events(self, text: str) -> None:
        """Publish events as they were recorded."""
        self.sns.publish(TopicArn=self.topic(self.settings.events_topic), Message=text)

    def has_subscribers(self, topic: str) -> bool:
        """Tell whether anybody listens to a topic."""
        return bool(self.sns.list_subscriptions_by_topic(TopicArn=self.topic(topic))["Subscriptions"])

    @property
    def executed(self) -> list[str]:
        """The ids of the shop's tasks that were executed, in order."""
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    # -- processes

    def mdstore(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the package's and wait for it."""
        return subprocess.run(
            [sys.executable, "-m", "mdstore", *arguments],
            cwd=ROOT, env=self.environ, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    @contextmanager
    def store_worker(self) -> Iterator[None]:
        """Run a worker of the data store."""
        with self._running("worker", "-m", "mdstore", "worker", "--concurrency", "1"):
            yield

    @contextmanager
    def shop_worker(self, node: str = SHOP_NODE, queue: str = "", **environ: str) -> Iterator[None]:
        """Run a worker of the shop on one queue, so that no queue waits for another's long poll."""
        options = ("worker", "-l", "INFO", "-c", "1", "-n", node, "-Q", queue or self.namespace)
        with self._running(node, "-m", "celery", "-A", "tests.compat.shop", *options, **environ):
            yield

    @contextmanager
    def front_door(self) -> Iterator[str]:
        """Run the HTTP API; gives its URL."""
        url = f"http://127.0.0.1:{self.settings.api_port}"
        with self._running("api", "-m", "mdstore", "api"):
            until(lambda: _answers(f"{url}/readyz"), within=30, what="the HTTP API is ready")
            yield url

    @contextmanager
    def event_listener(self) -> Iterator[Path]:
        """Run a listener to events; gives the file that it writes them to, once it is subscribed."""
        with self._running("events", "-m", "celery", "-A", "tests.compat.shop", "events", "--dump") as log:
            until(lambda: self.has_subscribers(self.settings.events_topic), what="the listener is subscribed")
            yield log

    @contextmanager
    def _running(self, name: str, *arguments: str, **environ: str) -> Iterator[Path]:
        log = self._directory / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT, env={**self.environ, "PYTHONUNBUFFERED": "1", **environ},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            yield log
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # nothing of it is needed any more
            process.wait()


@contextmanager
def emulator() -> Iterator[str]:
    """Run a fresh emulator; gives its URL."""
    with EmbeddedAws(port=free_port()) as running:
        yield running.url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310  our own child
            return True
    except (urllib.error.URLError, OSError):
        return False
