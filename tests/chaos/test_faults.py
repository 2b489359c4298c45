"""Faults between a worker and AWS: under each, 10,000 operations end exactly right and no message spends an attempt.

worker -> proxy (counts, and changes what microburst cannot) -> microburst (faults by rules) -> ministack. The producer and the
checks call ministack directly.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.local.stack import kill_group
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.chaos.faults import Faults, Rule
from tests.chaos.proxy import NOTHING, RECEIPT, FailAfterwards, ForgetTokens, Proxy, SpoilReads
from tests.chaos.workload import Workload
from tests.waiting import until

ROOT = Path(__file__).parents[2]
BLOCKS = 125  # of 80 operations
LANE = 125  # operations; small lanes make many calls, and calls are what fails here
MAX_RECEIVES = 2
WRITE = "TransactWriteItems"

_RECEIVED = re.compile(r"Task (mdstore\.\w+\[[^\]]+\]) received")
_SENT_AGAIN = re.compile(r"Task (mdstore\.\w+\[[^\]]+\]) retry: Retry in")
_SPENT = ("message.kept", "message.dead_lettered", "lane.failed", "request.failed")


#: Which calls fail: a random share, or a fixed sequence of failures and passes, for operations with few calls.
Share = float | tuple[int, int]
HALF, THIRD, TWO_THIRDS = (1, 1), (1, 2), (2, 1)  # fail, pass


def dynamodb(share: Share, operation: str | None = WRITE, **fault: Any) -> Rule:
    """Return a rule for calls to DynamoDB; `operation` None means every operation."""
    return {"service": "dynamodb", "operation": operation, **_chance(share), **fault}


def s3(share: Share, **fault: Any) -> Rule:
    """Return a rule for all calls to S3."""
    return {"service": "s3", **_chance(share), **fault}


def _chance(share: Share) -> Rule:
    if isinstance(share, tuple):
        return {"sequence": {"fail": share[0], "pass": share[1]}}
    return {"probability": share}


def cancelled(reason: str) -> Rule:
    """Return the fault that cancels a transaction for a reason that is not about its operations."""
    reasons = [{"Code": "None"}, {"Code": reason, "Message": "not now"}, {"Code": "None"}]
    return {"error": {"code": "TransactionCanceledException", "fields": {"CancellationReasons": reasons}}}


@dataclass(kw_only=True)
class Environment:
    """A namespace with a worker whose calls to DynamoDB and S3 go through `proxy` and `faults`."""

    client: Client
    faults: Faults
    proxy: Proxy
    log: Path
    workload: Workload
    rules: list[int] = field(default_factory=list)

    def run_workload(self) -> None:
        """Submit the workload, wait for its end, and check that its result is exactly right and that no attempt was spent."""
        for name, operations in (("load", self.workload.load), ("change", self.workload.change)):
            self.client.submit(operations, request_id=f"{self.workload.entity}/{name}").wait(timeout=240)
        until(lambda: self.proxy.under_way == 0, what="every call has ended, including those that the worker gave up")
        for name in ("load", "change"):
            self.workload.check(self.client, name)
        self.workload.check_records(self.client)
        self.check_attempts()
        assert self.proxy.reused == []  # no token was ever sent with other bytes
        print(f"{self.workload.size} operations; faults {self.fault_counts()};", end=" ")
        print(f"calls {self.proxy.count()}, {dict(self.proxy.answers)}")

    def check_attempts(self) -> None:
        """Assert that each message was received once, plus once for each time that the worker sent it again itself."""
        log = self.log.read_text()
        assert [event for event in _SPENT if event in log] == []
        received, sent_again = Counter(_RECEIVED.findall(log)), Counter(_SENT_AGAIN.findall(log))
        assert received
        assert {task: count for task, count in received.items() if count != 1 + sent_again[task]} == {}
        assert set(re.findall(r"message\.postponed .*? receives=(\d+)", log)) <= {"1"}
        sqs, settings = self.client.store.aws.sqs, self.client.settings
        for queue in (settings.queue, settings.dead_letter_queue):
            attributes = sqs.get_queue_attributes(
                QueueUrl=sqs.get_queue_url(QueueName=queue)["QueueUrl"], AttributeNames=["ApproximateNumberOfMessages"]
            )
            assert attributes["Attributes"]["ApproximateNumberOfMessages"] == "0", queue

    def fault_counts(self) -> list[int]:
        """Return how often each rule was applied."""
        return [self.faults.times_applied(rule) for rule in self.rules]


MakeEnvironment = Callable[..., AbstractContextManager[Environment]]


@pytest.fixture(scope="module")
def faults(aws: EmbeddedAws) -> Iterator[Faults]:
    with Faults(aws.url) as running:
        yield running


@pytest.fixture
def make_environment(aws: EmbeddedAws, faults: Faults, tmp_path: Path) -> MakeEnvironment:
    """Return a function that makes an environment with given fault rules and settings."""

    @contextmanager
    def make(
        *rules: Rule, blocks: int = BLOCKS, large: int = 0, environ: dict[str, str] | None = None
    ) -> Iterator[Environment]:
        direct = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": f"faults-{uuid4().hex[:12]}",
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_MAX_RECEIVES": str(MAX_RECEIVES),
            "MDSTORE_LANE_OPERATIONS": str(LANE),
            **(environ or {}),
        }
        settings = load_settings(direct).settings
        for _ in provision(settings):
            pass
        log = tmp_path / "worker.log"
        workload = Workload("thing", blocks=blocks, large=large)
        with Proxy(faults.url) as proxy, log.open("ab") as output:
            ids = faults.set(*rules)
            worker = subprocess.Popen(
                [sys.executable, "-m", "mdstore", "worker"],
                cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env={**direct, "AWS_ENDPOINT_URL_DYNAMODB": proxy.url, "AWS_ENDPOINT_URL_S3": proxy.url},
            )  # fmt: skip
            try:
                yield Environment(
                    client=Client(settings), faults=faults, proxy=proxy, log=log, workload=workload, rules=ids
                )
                assert worker.poll() is None
            finally:
                kill_group(worker)
                faults.set()
                # The emulator becomes slower the more it stores.
                urllib.request.urlopen(urllib.request.Request(f"{aws.url}/_ministack/reset", method="POST"), timeout=30)  # noqa: S310

    return make


def test_throttled_transactions_apply_once_and_spend_no_attempt(make_environment: MakeEnvironment) -> None:
    """30 % of all transactions are throttled, in each of DynamoDB's three forms."""
    codes = ("ProvisionedThroughputExceededException", "ThrottlingException")
    with make_environment(
        dynamodb(0.1, error={"code": codes[0]}),
        dynamodb(0.1 / 0.9, error={"code": codes[1]}),
        dynamodb(0.1 / 0.8, **cancelled("ThrottlingError")),
    ) as environment:
        environment.run_workload()

    counts = environment.fault_counts()
    assert [environment.proxy.count(code) for code in codes] == counts[:2]
    assert min(counts) >= 10
    assert 0.2 < sum(counts) / environment.proxy.count(name=WRITE) < 0.4
    assert sum(counts) > 20 * MAX_RECEIVES
    assert environment.proxy.repeats == sum(counts)  # each throttled transaction was sent again with the same token


def test_conflicts_apply_once_and_spend_no_attempt(make_environment: MakeEnvironment) -> None:
    """20 % of all transactions are cancelled for a conflict, and a third of the updates is refused for a conflict."""
    with make_environment(
        dynamodb(0.2, **cancelled("TransactionConflict")),
        dynamodb(THIRD, "UpdateItem", error={"code": "TransactionConflictException"}),
    ) as environment:
        environment.run_workload()

    transactions, updates = environment.fault_counts()
    assert 0.1 < transactions / environment.proxy.count(name=WRITE) < 0.3
    assert transactions > 15 * MAX_RECEIVES
    assert environment.proxy.count("TransactionConflictException") == updates >= 5
    assert environment.proxy.repeats == transactions


def test_server_errors_apply_once(make_environment: MakeEnvironment) -> None:
    """A fifth of the calls to DynamoDB and half of those to S3 fail with 5xx, and so do some transactions that applied."""
    afterwards = FailAfterwards(every=5)
    with make_environment(
        dynamodb(0.1, None, error={"code": "InternalServerError", "status": 500}),
        dynamodb(0.1, None, error={"code": "ServiceUnavailable", "status": 503}),
        s3(HALF, error={"code": "InternalError", "status": 500}),
        large=4,
    ) as environment:
        environment.proxy.on_answer = afterwards
        environment.run_workload()

    counts = environment.fault_counts()
    codes = ("InternalServerError", "ServiceUnavailable", "InternalError")
    assert [environment.proxy.count(code) for code in codes] == [counts[0] + afterwards.failed, *counts[1:]]
    assert min(counts[0], counts[1], afterwards.failed) >= 20
    assert counts[2] >= 10
    assert environment.proxy.count(RECEIPT) == 0


def test_connections_that_are_reset_apply_once(make_environment: MakeEnvironment) -> None:
    """20 % of the calls to DynamoDB and half of those to S3 end with a reset connection after the call was sent."""
    with make_environment(dynamodb(0.2, None, reset=True), s3(HALF, reset=True), large=4) as environment:
        environment.run_workload()

    dynamo, objects = environment.fault_counts()
    assert dynamo >= 40
    assert objects >= 10
    assert environment.proxy.count(NOTHING) >= dynamo + objects


def test_answers_lost_after_the_transaction_applied_change_nothing(make_environment: MakeEnvironment) -> None:
    """A quarter of the answers to transactions is lost; a repeat with the same token succeeds and does not apply again."""
    lost: Rule = {"response": {"abort_bytes": 0}}
    with make_environment(
        dynamodb(0.25, **lost), *(dynamodb(THIRD, name, **lost) for name in ("UpdateItem", "PutItem"))
    ) as environment:
        environment.run_workload()

    transactions, *single = environment.fault_counts()
    assert transactions >= 40
    assert min(single) >= 5
    assert environment.proxy.count(NOTHING) == transactions + sum(single)
    assert environment.proxy.repeats == transactions
    assert environment.proxy.count(RECEIPT) == 0  # the token sufficed


def test_answers_lost_for_longer_than_a_token_lives_change_nothing(make_environment: MakeEnvironment) -> None:
    """With 25 % of the answers lost and every repeated token forgotten, the receipts alone keep writes from applying twice."""
    forget = ForgetTokens()
    with make_environment(dynamodb(0.25, response={"abort_bytes": 0})) as environment:
        environment.proxy.on_call = forget
        environment.run_workload()

    (lost,) = environment.fault_counts()
    assert lost >= 40
    assert environment.proxy.count(NOTHING, name=WRITE) == environment.proxy.repeats == forget.forgotten == lost
    assert environment.proxy.count(RECEIPT) >= 20


def test_slow_down_answers_of_s3_spend_no_attempt(make_environment: MakeEnvironment) -> None:
    """Two of three calls to S3 are answered with SlowDown, so a repeated call may get it again."""
    with make_environment(s3(TWO_THIRDS, error={"code": "SlowDown", "status": 503}), large=4) as environment:
        environment.run_workload()

    (slow_downs,) = environment.fault_counts()
    assert environment.proxy.count("SlowDown") == slow_downs >= 15 * MAX_RECEIVES
    assert environment.proxy.count("SlowDown", name="GET") >= 20
    assert environment.proxy.count("ok", name="PUT") >= 4


def test_damaged_payloads_and_answers_are_read_again(make_environment: MakeEnvironment) -> None:
    """Each part of a payload first arrives cut, damaged and shortened, and 10 % of DynamoDB's answers arrive damaged."""
    spoil = SpoilReads()
    with make_environment(dynamodb(0.1, None, response={"corrupt_bytes": 1}), large=4) as environment:
        environment.proxy.on_answer = spoil
        environment.run_workload()
        lanes = sum(environment.client.status(f"thing/{name}").lanes for name in ("load", "change"))

    (damaged,) = environment.fault_counts()
    assert damaged >= 40
    assert lanes >= 70
    assert all(spoil.spoilt[way] >= lanes // 2 for way in spoil.WAYS), spoil.spoilt
    print(dict(spoil.spoilt))


def test_latency_changes_nothing(make_environment: MakeEnvironment) -> None:
    """Some calls take 1.5 s, and two transactions arrive after the worker has given up on them and sent them again."""
    with make_environment(
        dynamodb(1, latency=21_500, times=2),  # milliseconds; mdstore.aws.http waits for 20 s
        dynamodb(0.07, None, latency=1_500),
        s3((1, 9), latency=1_500),
    ) as environment:
        environment.run_workload()

    late, slow, objects = environment.fault_counts()
    assert (late, environment.proxy.repeats) == (2, 2)
    assert slow >= 8
    assert objects >= 1


def test_an_outage_longer_than_any_budget_spends_no_attempt(make_environment: MakeEnvironment) -> None:
    """During an outage a message is postponed more often than it may be received, and it completes after the outage."""
    budget = {"MDSTORE_LANE_BUDGET": "1"}
    throttled = dynamodb(1, error={"code": "ThrottlingException"})
    with make_environment(
        throttled, s3(1, error={"code": "SlowDown", "status": 503}), blocks=5, environ=budget
    ) as environment:

        def is_postponed(code: str) -> bool:
            return len(re.findall(rf"message\.postponed .*{code}", environment.log.read_text())) > MAX_RECEIVES

        request = environment.client.submit(environment.workload.load, request_id="thing/load")
        until(lambda: is_postponed("SlowDown"), what="S3's outage has postponed the message")
        environment.rules += environment.faults.set(throttled)
        until(lambda: is_postponed("ThrottlingException"), what="DynamoDB's outage has postponed the message")
        environment.faults.set()
        request.wait(timeout=60)
        environment.run_workload()

    assert environment.proxy.count("SlowDown") > 3 * MAX_RECEIVES
    assert environment.proxy.count("ThrottlingException") > 3 * MAX_RECEIVES
