"""`mdstore.queue` and the data store's tasks in real worker processes over the embedded AWS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from mdstore.client import Client
from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import stop_process
from mdstore.model import Reference, State
from mdstore.provision import provision
from mdstore.queue.app import SqsApp
from mdstore.settings import Settings, load_settings
from mdstore.tasks import create_store_app
from tests.dead_letters import receive_dead_letters
from tests.integration.transport_app import journaling_app
from tests.waiting import until

ROOT = Path(__file__).parents[2]
Environ = dict[str, str]


@contextmanager
def worker(
    environ: Environ, log: Path, app: str = "workers.celery_app", *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker with one pool process."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", app, "worker", "-l", "INFO", "-c", "1", *options],
            cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        stop_process(process)


def namespace(aws: EmbeddedAws, *, with_store: bool) -> Environ:
    """Provision a namespace; returns its environment. A message is redelivered after 12 s, and delivered twice at most."""
    made = {
        **os.environ,
        "AWS_ENDPOINT_URL": aws.url,
        "MDSTORE_NAMESPACE": f"queue-{uuid4().hex[:12]}",
        "MDSTORE_WAIT_TIME": "1",
        "MDSTORE_VISIBILITY_TIMEOUT": "12",
        "MDSTORE_TASK_TIME_LIMIT": "10",
        "MDSTORE_LANE_BUDGET": "8",
        "MDSTORE_MAX_RECEIVES": "2",
        "MDSTORE_LANE_OPERATIONS": "100",
    }
    for _ in provision(load_settings(made).settings, with_store=with_store):
        pass
    return made


@pytest.fixture
def environ(aws: EmbeddedAws) -> Environ:
    """Return the environment of a namespace with the data store's tables."""
    return namespace(aws, with_store=True)


@pytest.fixture
def settings(environ: Environ) -> Settings:
    return load_settings(environ).settings


@pytest.fixture
def client(settings: Settings) -> Client:
    return Client(settings)


def operations(count: int, entity: str = "thing") -> list[dict[str, Any]]:
    """Return upserts of `count` keys."""
    return [{"op": "upsert", "entity": entity, "key": f"k{n}", "data": {"n": n}} for n in range(count)]


def dead_letters(app: SqsApp, *, count: int) -> list[dict[str, Any]]:
    """Wait for `count` dead letters; returns body and attributes of each."""
    found: list[dict[str, Any]] = []

    def received() -> bool:
        found.extend(receive_dead_letters(app.aws.sqs, app.settings.dead_letter_queue))
        return len(found) >= count

    until(received)
    return found


def test_hostile_messages_are_dead_lettered_with_their_reason(client: Client, environ: Environ, tmp_path: Path) -> None:
    """Messages with a wrong reference or of another schema are never executed, and the worker continues."""
    good = client.submit(operations(3), request_id="good", on_invalid="raise").status().reference
    send = client.ingest.app.send_task
    wrong: dict[str, Reference] = {
        "is not the key of request": msgspec.structs.replace(good, payload="elsewhere/good"),
        "does not have the digest that the message says": msgspec.structs.replace(good, digest="0" * 64),
        "schema version 99": msgspec.structs.replace(good, v=99),
        "belongs to another request than the message": msgspec.structs.replace(good, lanes=7),
        "does not exist": msgspec.structs.replace(good, request_id="nobody", payload="payloads/nobody"),
    }
    messages: dict[str, Any] = {reason: msgspec.to_builtins(one) for reason, one in wrong.items()}
    messages["not a message of this schema"] = {"payload": "payloads/good", "digest": 7}
    for message in messages.values():
        send("mdstore.ingest", args=(message,))

    with worker(environ, tmp_path / "worker.log"):
        assert client.wait("good").counts.applied == {"upsert": 3}
        letters = dead_letters(client.app, count=len(messages))
        client.submit(operations(3), request_id="after").wait()

    reasons = sorted(letter["reason"] for letter in letters)
    assert len(reasons) == len(messages)
    for expected in messages:
        assert any(expected in reason for reason in reasons), (expected, reasons)
    assert {letter["task"] for letter in letters} == {"mdstore.ingest"}
    assert client.store.records.get("thing", "k0").version == 2


MALFORMED = {
    "no JSON": "hello",
    "no headers": json.dumps({"body": "{}", "properties": {}}),
    "no arguments": json.dumps({
        "body": "e30=", "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {"task": "mdstore.ingest", "id": "x"},
        "properties": {"delivery_info": {}, "body_encoding": "base64", "delivery_tag": "t"},
    }),
    "numbers for objects": json.dumps({"properties": 5}),
    "pickle": json.dumps({
        "body": "gASVAAAA", "content-type": "application/x-python-serialize", "content-encoding": "binary",
        "headers": {"task": "mdstore.ingest", "id": "x"},
        "properties": {"delivery_info": {}, "body_encoding": "base64", "delivery_tag": "t"},
    }),
    "unknown task": json.dumps({
        "body": "W1tdLHt9LHt9XQ==", "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {"task": "os.system", "id": "x"},
        "properties": {"delivery_info": {}, "body_encoding": "base64", "delivery_tag": "t"},
    }),
}  # fmt: skip


def test_malformed_messages_never_stop_a_worker(client: Client, environ: Environ, tmp_path: Path) -> None:
    """Malformed messages do not keep the worker from executing the messages before, between and after them."""
    for number, text in enumerate(MALFORMED.values()):
        _send_again(client, text)
        client.submit(operations(2), request_id=f"between-{number}")

    with worker(environ, tmp_path / "worker.log") as process:
        for number in range(len(MALFORMED)):
            client.submit(operations(2), request_id=f"after-{number}")
            assert client.wait(f"between-{number}").state is State.COMPLETED
            assert client.wait(f"after-{number}").state is State.COMPLETED
        letters = dead_letters(client.app, count=len(MALFORMED))
        assert client.submit(operations(2), request_id="last").wait(20).status().state is State.COMPLETED
        assert process.poll() is None

    assert {letter["body"] for letter in letters} == set(MALFORMED.values())


def test_a_damaged_payload_fails_its_request(client: Client, environ: Environ, tmp_path: Path) -> None:
    """A payload that was changed in S3 is not executed: its lane is dead-lettered, and its request and result say why."""
    submission = client.submit(operations(250), request_id="damaged")
    s3, bucket = client.store.aws.s3, client.settings.bucket
    body = bytearray(s3.get_object(Bucket=bucket, Key="payloads/damaged")["Body"].read())
    body[-200] ^= 1
    s3.put_object(Bucket=bucket, Key="payloads/damaged", Body=bytes(body))

    with worker(environ, tmp_path / "worker.log"):
        request = submission.wait().status()
        with pytest.raises(ChordError):
            client.ingest.AsyncResult("damaged").get(timeout=60)

    assert request.state is State.FAILED
    assert "does not have the digest that its header says" in request.error
    assert len(list(client.export("thing"))) == 250 - client.store.payloads.header(request.reference).lanes[-1].count


def test_a_broken_deployment_fails_requests_and_keeps_their_messages(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    """Without the records table a request fails and says why; its messages are kept, and complete it once the table is back."""
    client.store.aws.dynamodb.delete_table(TableName=client.settings.records_table)
    client.submit(operations(3), request_id="one-lane")
    client.submit(operations(250), request_id="lanes")

    with worker(environ, tmp_path / "worker.log"):
        for name in ("one-lane", "lanes"):
            until(lambda name=name: _has_state(client, name, State.FAILED))  # type: ignore[misc]
            until(lambda name=name: "ResourceNotFoundException" in client.status(name).error)  # type: ignore[misc]
        letters = dead_letters(client.app, count=1 + client.status("lanes").lanes)
        for _ in provision(client.settings):
            pass
        for letter in letters:
            _send_again(client, letter["body"])
        for name in ("one-lane", "lanes"):
            until(lambda name=name: _has_state(client, name, State.COMPLETED))  # type: ignore[misc]

    assert client.status("lanes").counts.applied == {"upsert": 250}
    assert client.verify("one-lane").faults == []
    assert client.verify("lanes").faults == []


def _has_state(client: Client, name: str, state: State) -> bool:
    return client.status(name).state is state


def _send_again(client: Client, body: str) -> None:
    sqs = client.store.aws.sqs
    url = sqs.get_queue_url(QueueName=client.settings.queue)["QueueUrl"]
    sqs.send_message(QueueUrl=url, MessageBody=body)


def test_nothing_is_acknowledged_when_sqs_does_not_take_the_message(client: Client) -> None:
    """If the queue is missing, `submit` raises one of the package's errors, and the same request id can be submitted later."""
    sqs = client.store.aws.sqs
    sqs.delete_queue(QueueUrl=sqs.get_queue_url(QueueName=client.settings.queue)["QueueUrl"])
    with pytest.raises((DeploymentBroken, Unavailable)):
        client.submit(operations(1), request_id="later")
    for _ in provision(client.settings):
        pass
    again = Client(client.settings).submit(operations(1), request_id="later")
    assert again.status().state is State.ACCEPTED


def test_ingest_works_in_every_canvas(client: Client, environ: Environ, tmp_path: Path) -> None:
    """`ingest` returns its summary in a group, a chord, a chain and with a link, for requests of one lane and of many."""
    task = client.ingest
    with worker(environ, tmp_path / "worker.log"):
        together = group([task.s(operations(2, "g1")), task.s(operations(2, "g2"))], app=client.app).apply_async()
        assert [one["applied"] for one in together.get(timeout=60)] == [2, 2]

        header = [task.s(operations(2, "c1")), task.s(operations(250, "c2"))]
        callback = task.si(operations(1, "after-chord"))
        assert chord(header, app=client.app)(callback).get(timeout=60)["applied"] == 1
        assert len(list(client.export("c2"))) == 250

        linked = task.apply_async((operations(1, "first"),), link=task.si(operations(1, "linked")))
        assert linked.get(timeout=60)["state"] == "completed"
        until(lambda: len(list(client.export("linked"))) == 1)

        many, few = operations(250, "ch1"), operations(1, "ch2")
        assert chain(task.si(many), task.si(few), app=client.app).apply_async().get(timeout=60)["applied"] == 1
        assert len(list(client.export("ch1"))) == 250

        same = task.delay(operations(2, "g1"), request_id="named")
        again = task.delay(operations(2, "g1"), request_id="named")
        assert again.get(timeout=60) == same.get(timeout=60)
        assert again.get()["request_id"] == "named"


def plain(settings: Settings) -> SqsApp:
    """Return the plain app over the test's own namespace."""
    from tests.integration.plain_app import plain_app  # noqa: PLC0415  importing it makes an app with default settings

    return plain_app(settings)


def test_chords_of_plain_tasks_survive_duplicates(settings: Settings, environ: Environ, tmp_path: Path) -> None:
    """With every message sent three times, a chord's callback gets each part once, and no success turns into FAILURE."""
    app = plain(settings)
    add, total = app.tasks["add"], app.tasks["total"]
    with worker({**environ, "DELIVERIES": "3"}, tmp_path / "worker.log", "tests.integration.plain_app"):
        results = [chord([add.s(n, n) for n in range(size)], total.s(), app=app)() for size in (1, 2, 25)]
        assert [result.get(timeout=90) for result in results] == [0, 2, 600]
        one_more = add.delay(1, 1)
        assert one_more.get(timeout=60) == 2  # by now every message sent before it has been delivered
    assert [result.state for result in results] == ["SUCCESS"] * 3


def test_a_failed_part_fails_its_chord_once(settings: Settings, environ: Environ, tmp_path: Path) -> None:
    """A chord with a part that raises ends with a ChordError that contains the part's message."""
    app = plain(settings)
    header = [app.tasks["add"].s(1, 1), app.tasks["fail"].s("on purpose")]
    with worker(environ, tmp_path / "worker.log", "tests.integration.plain_app"):
        result = chord(header, app.tasks["total"].s(), app=app)()
        with pytest.raises(ChordError, match="on purpose"):
            result.get(timeout=60, follow_parents=False)  # else the part's own error may be raised first


@pytest.mark.parametrize("is_last", [True, False])
def test_the_last_lane_completes_its_request_if_it_ends_last(settings: Settings, is_last: bool) -> None:
    """If the lane with the highest number ends last, it completes the request itself; otherwise `finish` completes it."""
    app = create_store_app(settings)
    tasks: Any = app.tasks
    accepted = app.store.ingestor.accept(operations(500), publish=lambda _: None)
    reference, ledger = accepted.reference, app.store.ledger
    message = msgspec.to_builtins(reference)
    ledger.start(reference, operations=500, refused={})
    *others, last = range(reference.lanes)
    for lane in (*others, last) if is_last else (last, *others):
        assert ledger.get(reference.request_id).state is State.RUNNING
        tasks["mdstore.apply_lane"].run(message, lane)

    early = ledger.get(reference.request_id)
    assert (early.state is State.COMPLETED) is is_last
    assert tasks["mdstore.finish"].run(message)["applied"] == 500
    request = ledger.get(reference.request_id)
    assert (request.state, request.counts.applied) == (State.COMPLETED, {"upsert": 500})
    assert request == early or not is_last


def test_a_lane_completes_even_if_it_cannot_complete_the_request(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If completing the request fails with Unavailable, the lane is still completed, and leaves the request to `finish`."""
    app = create_store_app(settings)
    reference = app.store.ingestor.accept(operations(500), publish=lambda _: None).reference
    asked: list[str] = []

    def unavailable(request_id: str) -> Any:
        asked.append(request_id)
        raise Unavailable("unavailable", code="Test")

    monkeypatch.setattr(app.store.ledger, "finish", unavailable)
    tasks: Any = app.tasks
    tasks["mdstore.apply_lane"].run(msgspec.to_builtins(reference), reference.lanes - 1)
    assert asked == [reference.request_id]
    summary = app.store.ledger.lane(reference.request_id, reference.lanes - 1)
    assert summary is not None
    assert summary.state is State.COMPLETED


def test_messages_are_small_json(client: Client) -> None:
    """A message holds the reference but none of the data, as JSON without a second layer of base64."""
    client.submit([{"op": "upsert", "entity": "thing", "key": "k", "data": {"secret": "SENTINEL"}}], request_id="small")
    sqs = client.store.aws.sqs
    url = sqs.get_queue_url(QueueName=client.settings.queue)["QueueUrl"]
    body = sqs.receive_message(QueueUrl=url, WaitTimeSeconds=1)["Messages"][0]["Body"]

    assert json.loads(body)["headers"]["task"] == "mdstore.ingest"
    assert len(body) < 2_000
    assert "SENTINEL" not in body


def test_a_worker_resumes_after_an_outage_of_sqs(environ: Environ, tmp_path: Path) -> None:
    """A worker whose SQS refuses connections, and later answers with errors, receives messages again once SQS works."""
    own_aws = EmbeddedAws(port=free_port())
    own_aws.start()
    own_environ = {**environ, "AWS_ENDPOINT_URL": own_aws.url}
    settings = load_settings(own_environ).settings
    log = tmp_path / "worker.log"
    try:
        for _ in provision(settings):
            pass
        with worker(own_environ, log) as process:
            Client(settings).submit(operations(3), request_id="before").wait()
            own_aws.stop()
            until(lambda: "failed, retry in" in log.read_text())
            own_aws.start()  # its state is lost: receiving from a queue that does not exist is an error, too
            count = log.read_text().count("failed, retry in")
            until(lambda: log.read_text().count("failed, retry in") > count)
            for _ in provision(settings):
                pass
            request = Client(settings).submit(operations(3), request_id="after").wait().status()
            assert process.poll() is None
        assert request.counts.applied == {"upsert": 3}
    finally:
        own_aws.stop()


def test_the_last_failure_of_a_store_task_calls_its_error_callback_once(
    environ: Environ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error callback runs once: when the message is dead-lettered, not at the earlier failure."""
    journal = tmp_path / "journal"
    environ |= {"JOURNAL": str(journal), "MDSTORE_VISIBILITY_TIMEOUT": "2", "MDSTORE_TASK_TIME_LIMIT": "60"}
    monkeypatch.setenv("JOURNAL", str(journal))
    app = journaling_app(load_settings(environ).settings, make=create_store_app)
    operations = [{"op": "upsert", "entity": "thing", "key": "k", "data": {}}]
    broken = {**environ, "MDSTORE_RECORDS_TABLE": "missing"}
    app.tasks["mdstore.ingest"].apply_async((operations,), link_error=app.tasks["touch"].si(7))
    with worker(broken, tmp_path / "1.log", "tests.integration.store_app"):
        (letter,) = dead_letters(app, count=1)
        assert "ResourceNotFoundException" in letter["reason"]
        until(journal.exists)
        time.sleep(2)
    assert journal.read_text().splitlines() == ["7"]
