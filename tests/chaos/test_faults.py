"""Faults between a worker and AWS: 20,000 operations end exactly right under each, and no message spends an attempt.

worker -> proxy (counts; spoils what microburst cannot) -> microburst (faults by rules) -> ministack. The producer, and who
checks, call ministack itself.
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
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import kill_group
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.chaos.faults import Faults, Rule
from tests.chaos.proxy import NOTHING, RECEIPT, FailAfterwards, ForgetTokens, Proxy, SpoilReads
from tests.chaos.workload import Workload
from tests.waiting import until

ROOT = Path(__file__).parents[2]
BLOCKS = 250  # of 80 operations
MAX_RECEIVES = 2
WRITE = "TransactWriteItems"
SMALL_LANES = {"MDSTORE_LANE_OPERATIONS": "250"}  # more reads of S3

_RECEIVED = re.compile(r"Task (mdstore\.\w+\[[^\]]+\]) received")
_SENT_AGAIN = re.compile(r"Task (mdstore\.\w+\[[^\]]+\]) retry: Retry in")
_SPENT = ("message.kept", "message.dead_lettered", "lane.failed", "request.failed")


#: How many of the calls: a share of them by chance, or so many of a sequence, which few calls need.
Share = float | tuple[int, int]
HALF, THIRD, TWO_THIRDS = (1, 1), (1, 2), (2, 1)  # fail, pass


def dynamodb(share: Share, operation: str | None = WRITE, **fault: Any) -> Rule:
    """A rule for calls of DynamoDB."""
    return {"service": "dynamodb", "operation": operation, **_chance(share), **fault}


def s3(share: Share, **fault: Any) -> Rule:
    """A rule for all calls of S3."""
    return {"service": "s3", **_chance(share), **fault}


def _chance(share: Share) -> Rule:
    if isinstance(share, tuple):
        return {"sequence": {"fail": share[0], "pass": share[1]}}
    return {"probability": share}


def cancelled(reason: str) -> Rule:
    """The fault of a transaction that is cancelled for a reason which says nothing about its operations."""
    reasons = [{"Code": "None"}, {"Code": reason, "Message": "not now"}, {"Code": "None"}]
    return {"error": {"code": "TransactionCanceledException", "fields": {"CancellationReasons": reasons}}}


@dataclass(kw_only=True)
class Scene:
    """A namespace with a worker whose calls of DynamoDB and S3 go through `proxy` and `faults`."""

    client: Client
    faults: Faults
    proxy: Proxy
    log: Path
    workload: Workload
    rules: list[int] = field(default_factory=list)

    def play(self) -> None:
        """Send the workload, wait for its end, and check that it is exactly right and that no attempt was spent."""
        for name, operations in (("load", self.workload.load), ("change", self.workload.change)):
            self.client.submit(operations, request_id=f"{self.workload.entity}/{name}").wait(timeout=240)
        until(lambda: self.proxy.under_way == 0, what="every call has come to its end, also what its caller left")
        for name in ("load", "change"):
            self.workload.check(self.client, name)
        self.workload.check_records(self.client)
        self.check_attempts()
        assert self.proxy.forged == []  # no token ever came with other bytes
        print(
            f"{self.workload.size} operations; fired {[self.faults.times_fired(rule) for rule in self.rules]};", end=" "
        )
        print(f"calls {self.proxy.count()}, {dict(self.proxy.answers)}")

    def check_attempts(self) -> None:
        """Assert that each message was received once, and once more each time that the worker itself sent it again."""
        log = self.log.read_text()
        assert [word for word in _SPENT if word in log] == []
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

    def dispatched(self) -> list[int]:
        """How often each rule of the scene has fired."""
        return [self.faults.times_fired(rule) for rule in self.rules]


Stage = Callable[..., AbstractContextManager[Scene]]


@pytest.fixture(scope="module")
def aws() -> Iterator[EmbeddedAws]:
    with EmbeddedAws(port=free_port()) as running:
        yield running


@pytest.fixture(scope="module")
def faults(aws: EmbeddedAws) -> Iterator[Faults]:
    with Faults(aws.url) as running:
        yield running


@pytest.fixture
def stage(aws: EmbeddedAws, faults: Faults, tmp_path: Path) -> Stage:
    """Return a function that sets a scene: rules, and settings of its own."""

    @contextmanager
    def set_scene(
        *rules: Rule, blocks: int = BLOCKS, large: int = 0, environ: dict[str, str] | None = None
    ) -> Iterator[Scene]:
        direct = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": f"faults-{uuid4().hex[:12]}",
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_MAX_RECEIVES": str(MAX_RECEIVES),
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
                yield Scene(client=Client(settings), faults=faults, proxy=proxy, log=log, workload=workload, rules=ids)
                assert worker.poll() is None
            finally:
                kill_group(worker)
                faults.set()
                # The emulator is slower the more it holds.
                urllib.request.urlopen(urllib.request.Request(f"{aws.url}/_ministack/reset", method="POST"), timeout=30)  # noqa: S310

    return set_scene


def test_throttled_transactions_apply_once_and_spend_no_attempt(stage: Stage) -> None:
    """Of all transactions 30 % are throttled, in each of DynamoDB's three ways to say so."""
    codes = ("ProvisionedThroughputExceededException", "ThrottlingException")
    with stage(
        dynamodb(0.1, error={"code": codes[0]}),
        dynamodb(0.1 / 0.9, error={"code": codes[1]}),
        dynamodb(0.1 / 0.8, **cancelled("ThrottlingError")),
    ) as scene:
        scene.play()

    dispatched = scene.dispatched()
    assert [scene.proxy.count(code) for code in codes] == dispatched[:2]
    assert min(dispatched) >= 10
    assert 0.2 < sum(dispatched) / scene.proxy.count(name=WRITE) < 0.4
    assert sum(dispatched) > 20 * MAX_RECEIVES
    assert scene.proxy.repeats == sum(dispatched)  # the same bytes and token again, and nothing else


def test_conflicts_apply_once_and_spend_no_attempt(stage: Stage) -> None:
    """Of all transactions 20 % are cancelled for a conflict, and a third of the updates refused for one."""
    with stage(
        dynamodb(0.2, **cancelled("TransactionConflict")),
        dynamodb(THIRD, "UpdateItem", error={"code": "TransactionConflictException"}),
    ) as scene:
        scene.play()

    transactions, updates = scene.dispatched()
    assert 0.1 < transactions / scene.proxy.count(name=WRITE) < 0.3
    assert transactions > 15 * MAX_RECEIVES
    assert scene.proxy.count("TransactionConflictException") == updates >= 5
    assert scene.proxy.repeats == transactions


def test_server_errors_apply_once(stage: Stage) -> None:
    """A fifth of the calls of DynamoDB and half of S3's fail with 5xx, and so do some transactions that did apply."""
    afterwards = FailAfterwards(every=5)
    with stage(
        dynamodb(0.1, None, error={"code": "InternalServerError", "status": 500}),
        dynamodb(0.1, None, error={"code": "ServiceUnavailable", "status": 503}),
        s3(HALF, error={"code": "InternalError", "status": 500}),
        large=4,
    ) as scene:
        scene.proxy.on_answer = afterwards
        scene.play()

    dispatched = scene.dispatched()
    codes = ("InternalServerError", "ServiceUnavailable", "InternalError")
    assert [scene.proxy.count(code) for code in codes] == [dispatched[0] + afterwards.failed, *dispatched[1:]]
    assert min(dispatched[0], dispatched[1], afterwards.failed) >= 20
    assert dispatched[2] >= 10
    assert scene.proxy.count(RECEIPT) == 0


def test_connections_that_are_reset_apply_once(stage: Stage) -> None:
    """Of DynamoDB's connections 20 %, and half of S3's, are reset when a call has been sent."""
    with stage(dynamodb(0.2, None, reset=True), s3(HALF, reset=True), large=4) as scene:
        scene.play()

    dynamo, objects = scene.dispatched()
    assert dynamo >= 40
    assert objects >= 10
    assert scene.proxy.count(NOTHING) >= dynamo + objects


def test_answers_lost_after_the_transaction_applied_change_nothing(stage: Stage) -> None:
    """A fourth of the answers to writes is lost; the same token again gets "success" without applying twice."""
    lost: Rule = {"response": {"abort_bytes": 0}}
    with stage(dynamodb(0.25, **lost), *(dynamodb(THIRD, name, **lost) for name in ("UpdateItem", "PutItem"))) as scene:
        scene.play()

    transactions, *single = scene.dispatched()
    assert transactions >= 40
    assert min(single) >= 5
    assert scene.proxy.count(NOTHING) == transactions + sum(single)
    assert scene.proxy.repeats == transactions
    assert scene.proxy.count(RECEIPT) == 0  # the token was enough


def test_answers_lost_for_longer_than_a_token_lives_change_nothing(stage: Stage) -> None:
    """With 25 % of the answers lost and every repeated token unknown, the receipt alone keeps writes from applying twice."""
    forget = ForgetTokens()
    with stage(dynamodb(0.25, response={"abort_bytes": 0})) as scene:
        scene.proxy.on_call = forget
        scene.play()

    (lost,) = scene.dispatched()
    assert lost >= 40
    assert scene.proxy.count(NOTHING, name=WRITE) == scene.proxy.repeats == forget.forgotten == lost
    assert scene.proxy.count(RECEIPT) >= 20


def test_s3_that_slows_down_spends_no_attempt(stage: Stage) -> None:
    """Two of three reads and writes of S3 are told to slow down, so that a call is told so again."""
    with stage(s3(TWO_THIRDS, error={"code": "SlowDown", "status": 503}), large=4, environ=SMALL_LANES) as scene:
        scene.play()

    (dispatched,) = scene.dispatched()
    assert scene.proxy.count("SlowDown") == dispatched >= 15 * MAX_RECEIVES
    assert scene.proxy.count("SlowDown", name="GET") >= 20
    assert scene.proxy.count("ok", name="PUT") >= 4


def test_payloads_and_answers_that_are_damaged_on_their_way_are_read_again(stage: Stage) -> None:
    """Each part of a payload is cut, damaged and shortened before it comes whole; of DynamoDB's answers 10 % are damaged."""
    spoil = SpoilReads()
    with stage(dynamodb(0.1, None, response={"corrupt_bytes": 1}), environ=SMALL_LANES, large=4) as scene:
        scene.proxy.on_answer = spoil
        scene.play()
        lanes = sum(scene.client.status(f"thing/{name}").lanes for name in ("load", "change"))

    (damaged,) = scene.dispatched()
    assert damaged >= 40
    assert lanes >= 70
    assert all(spoil.spoilt[way] >= lanes // 2 for way in spoil.WAYS), spoil.spoilt
    print(dict(spoil.spoilt))


def test_latency_changes_nothing(stage: Stage) -> None:
    """Some calls take 1.5 s, and two transactions arrive after their caller has given up and sent them again."""
    with stage(
        dynamodb(1, latency=21_500, times=2),  # mdstore.aws.http waits for 20 s
        dynamodb(0.07, None, latency=1_500),
        s3((1, 9), latency=1_500),
    ) as scene:
        scene.play()

    late, slow, objects = scene.dispatched()
    assert (late, scene.proxy.repeats) == (2, 2)
    assert slow >= 8
    assert objects >= 1


def test_an_outage_longer_than_any_budget_spends_no_attempt(stage: Stage) -> None:
    """Told "not now" each time, a message is put off more often than it may be received, and completes when it is over."""
    budget = {"MDSTORE_LANE_BUDGET": "1"}
    throttled = dynamodb(1, error={"code": "ThrottlingException"})
    with stage(throttled, s3(1, error={"code": "SlowDown", "status": 503}), blocks=5, environ=budget) as scene:

        def put_off(code: str) -> bool:
            return len(re.findall(rf"message\.postponed .*{code}", scene.log.read_text())) > MAX_RECEIVES

        request = scene.client.submit(scene.workload.load, request_id="thing/load")
        until(lambda: put_off("SlowDown"), what="S3's outage has put the message off")
        scene.rules += scene.faults.set(throttled)
        until(lambda: put_off("ThrottlingException"), what="DynamoDB's outage has put the message off")
        scene.faults.set()
        request.wait(timeout=60)
        scene.play()

    assert scene.proxy.count("SlowDown") > 3 * MAX_RECEIVES
    assert scene.proxy.count("ThrottlingException") > 3 * MAX_RECEIVES
