"""The table of delayed messages on a real emulator: several processes move them, some are killed, and every message arrives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mdstore.aws.clients import AwsClients
from mdstore.local.emulator import EmbeddedAws
from mdstore.provision import provision
from mdstore.queue.delayed.table import LEASE, SHARDS, DelayedMessage, DelayedTable
from mdstore.queue.worker.periodic import Periodic
from mdstore.settings import Settings, load_settings
from tests.integration.moving import KILL_POINTS, CountingDynamo, counting_dynamo, sender
from tests.waiting import until

ROOT = Path(__file__).parents[2]
DAY = 86_400


class Environment:
    """A provisioned namespace, and processes that move its delayed messages."""

    def __init__(self, url: str, directory: Path) -> None:
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "AWS_ENDPOINT_URL": url,
            "MDSTORE_NAMESPACE": f"due-{uuid4().hex[:12]}",
        }
        self.settings: Settings = load_settings(self.environ).settings
        for _ in provision(self.settings, with_store=False):
            pass
        self.aws = AwsClients(self.settings)
        self.dynamo: CountingDynamo = counting_dynamo(self.aws)
        self.table = self.at(0)
        self.out = directory / "sent"

    def at(self, ahead: float) -> DelayedTable:
        """Return the table with a clock that is `ahead` seconds fast."""
        return DelayedTable(dynamo=self.dynamo, table=self.settings.delayed_table, clock=lambda: time.time() + ahead)

    def put(self, count: int, *, ahead: float = 60.0, body: str = "{}") -> set[str]:
        """Put messages that are due at the same moment; returns their ids."""
        due_at = time.time() + ahead
        ids = [f"t{number}:{ahead}" for number in range(count)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda one: self.table.put(self.settings.queue, body, due_at, deduplication_id=one), ids))
        return set(ids)

    def spawn(self, step: str = "") -> subprocess.Popen[bytes]:
        """Start a process that moves messages, and kills itself at `step` if one is given."""
        command = [sys.executable, "-m", "tests.integration.moving", str(self.out), step]
        return subprocess.Popen(command, cwd=ROOT, env=self.environ)

    def move(self, ahead: float = 0.0) -> int:
        """Move messages in this process, as a spawned one does; returns how many were moved."""
        deliver = sender(self.aws)

        def send(batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
            accepted = deliver(batch)
            with self.out.open("a") as output:
                output.write("".join(f"{one.deduplication_id}\n" for one in accepted))
            return accepted

        return self.at(ahead).move(send)

    @property
    def sent(self) -> list[str]:
        return self.out.read_text().splitlines() if self.out.exists() else []

    def queued(self, kind: str = "") -> int:
        """Return how many messages the queue has; `kind` is `Delayed` for those that SQS still delays."""
        url = self.aws.sqs.get_queue_url(QueueName=self.settings.queue)["QueueUrl"]
        found: dict[Any, str] = {
            **self.aws.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        }
        return int(found[f"ApproximateNumberOfMessages{kind}"])

    def left(self) -> int:
        """Return how many messages the table holds; the state is one more item."""
        return self.aws.dynamodb.scan(TableName=self.settings.delayed_table, Select="COUNT")["Count"] - 1


@pytest.fixture
def environment(aws: EmbeddedAws, tmp_path: Path) -> Environment:
    return Environment(aws.url, tmp_path)


def test_a_message_waits_in_the_table_then_in_sqs_then_arrives(environment: Environment) -> None:
    """A running mover moves a message as soon as SQS can delay it for the rest of its time, and SQS delays it no longer."""
    queue = environment.settings.queue
    began = time.time()
    environment.table.put(queue, "late", began + 3_600, deduplication_id="late")
    environment.table.put(queue, "delayed", began + 890, deduplication_id="delayed")
    environment.table.put(queue, "soon", began + 3, deduplication_id="soon")
    send = sender(environment.aws)
    mover = Periodic("due", lambda stopping: environment.table.move(send, stopping=stopping) > 0, interval=0.2)
    mover.start()
    until(lambda: environment.left() == 1)
    assert mover.stop()
    url = environment.aws.sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    found = environment.aws.sqs.receive_message(QueueUrl=url, WaitTimeSeconds=10, MaxNumberOfMessages=10)["Messages"]
    arrived = time.time()
    assert [one["Body"] for one in found] == ["soon"]
    assert began + 3 <= arrived < began + 6
    assert environment.queued("Delayed") == 1


def test_a_time_to_live_is_set(environment: Environment) -> None:
    """Messages that nobody moves expire, more than 80 days after they were put."""
    described = environment.aws.dynamodb.describe_time_to_live(TableName=environment.settings.delayed_table)[
        "TimeToLiveDescription"
    ]
    assert described["TimeToLiveStatus"] == "ENABLED"
    environment.put(1)
    found = environment.aws.dynamodb.scan(TableName=environment.settings.delayed_table)["Items"]
    assert [
        float(item[described["AttributeName"]]["N"]) > time.time() + 80 * DAY for item in found if "body" in item
    ] == [True]


def test_a_message_put_by_many_threads_is_kept_once(environment: Environment) -> None:
    """DynamoDB's own condition decides: of 50 concurrent puts of one id, exactly one stores the message."""
    due_at = time.time() + 60
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda _: environment.table.put("q", "{}", due_at, deduplication_id="t1:0"), range(50)))
    assert Counter(new) == {True: 1, False: 49}
    assert environment.left() == 1


def test_several_processes_share_the_due_messages(environment: Environment) -> None:
    """Three processes move 2,000 messages that are due at one moment: each message is sent exactly once."""
    ids = environment.put(2_000, body="x" * 500)
    movers = [environment.spawn() for _ in range(3)]
    assert [mover.wait(60) for mover in movers] == [0, 0, 0]
    assert sorted(environment.sent) == sorted(ids)
    assert environment.queued() + environment.queued("Delayed") == len(ids)
    assert environment.left() == 0


def test_calls_per_moved_message(environment: Environment) -> None:
    """Moving costs a tenth of a call to SQS and a tenth of a call to DynamoDB per message, plus a few calls per shard."""
    environment.put(600)
    environment.dynamo.calls.clear()
    deliver, sends = sender(environment.aws), Counter[int]()

    def send(batch: Any) -> Any:
        sends[len(batch)] += 1
        return deliver(batch)

    assert environment.table.move(send) == 600
    assert sum(sends.values()) <= 60 + SHARDS
    calls = environment.dynamo.calls
    batches = sum(sends.values())
    assert calls == {
        "GetItem": 1, "UpdateItem": 2 * SHARDS, "Query": calls["Query"], "BatchWriteItem": batches,
    }  # fmt: skip
    assert calls["Query"] <= 3 * SHARDS


@pytest.mark.parametrize("step", KILL_POINTS)
def test_a_mover_killed_at_any_step_loses_nothing(environment: Environment, step: str) -> None:
    """After its lease ends another mover continues; only messages that were sent but not deleted are sent twice."""
    ids = environment.put(120)
    killed = environment.spawn(step)
    assert killed.wait(60) == -signal.SIGKILL
    before = environment.sent
    assert environment.move() + environment.move(ahead=LEASE + 5) >= len(ids - set(before))
    assert environment.move(ahead=LEASE + 5) == 0
    assert set(environment.sent) == ids
    repeated = len(environment.sent) - len(ids)
    assert repeated <= len(before)
    assert repeated <= 10 * 4
    assert repeated > 0 or step != "send"
    assert environment.left() == 0


def test_after_days_without_a_worker_every_message_is_found(environment: Environment) -> None:
    """After seven days without a mover, each hour of the pause is queried once per shard."""
    ids = set().union(*(environment.put(3, ahead=day * DAY + 60) for day in range(6)))
    sent: list[str] = []

    def send(batch: list[DelayedMessage]) -> list[DelayedMessage]:
        sent.extend(one.deduplication_id for one in batch)
        return batch

    assert environment.at(7 * DAY).move(send) == 18  # type: ignore[arg-type]
    assert set(sent) == ids
    assert environment.dynamo.calls["Query"] <= SHARDS * (7 * 24 + 3)
    environment.dynamo.calls.clear()
    assert environment.at(7 * DAY + 60).move(send) == 0  # type: ignore[arg-type]
    assert environment.dynamo.calls["Query"] <= SHARDS * 3
