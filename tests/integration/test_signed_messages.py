"""In an app with a key, a real worker executes what processes with the key sent, and dead-letters everything else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import State
from mdstore.provision import provision
from mdstore.queue.broker.authentication import Authenticator, FixedKeys
from mdstore.settings import load_settings
from mdstore.tasks import create_store_app
from tests.integration.test_forger import OPERATION, WAYS, Target, mark_of, message, nothing_happened
from tests.integration.test_queue import Environ, namespace, operations, worker
from tests.integration.transport_app import journaling_app
from tests.waiting import until

KEY, OTHER = "a key of this deployment " * 2, "another key " * 4


@pytest.fixture(scope="module")
def environ(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Environ:
    journal = tmp_path_factory.mktemp("signed") / "journal"
    return namespace(aws, with_store=True) | {"MDSTORE_SIGNING_KEYS": KEY, "JOURNAL": str(journal)}


@pytest.fixture(scope="module")
def target(environ: Environ) -> Iterator[Target]:
    """Yield a store whose worker requires signatures."""
    log = Path(environ["JOURNAL"]).with_name("worker.log")
    with worker(environ, log, "tests.integration.store_app"):
        yield Target(client_of(environ), log)


def client_of(environ: Environ, **changes: str) -> Client:
    return Client(app=journaling_app(load_settings(environ | changes).settings, make=create_store_app))


def bodies_in(client: Client, queue: str) -> list[str]:
    """Receive the messages of a queue, and leave them there."""
    sqs = client.store.aws.sqs
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    answer = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1, VisibilityTimeout=0)
    return [one["Body"] for one in answer.get("Messages", [])]


@pytest.mark.parametrize("way", WAYS)
def test_an_unsigned_message_is_dead_lettered_for_that(target: Target, way: str) -> None:
    """The worker records nothing about the task that the message names."""
    sent = WAYS[way]()
    target.send(sent)
    mark = mark_of(sent) if way != "operations as arguments" else sent["headers"]["id"]
    assert target.reason_for(mark) == "the message is not signed"
    if "headers" in sent and sent["headers"]["id"].isprintable():
        assert target.client.app.AsyncResult(sent["headers"]["id"]).state == "PENDING"
    nothing_happened(target)


def test_a_message_that_another_key_signed_or_that_was_changed_is_dead_lettered(
    target: Target, environ: Environ
) -> None:
    """A message that was signed for another queue is dead-lettered too."""
    genuine = json.dumps(message("echo", 1))
    authenticator = Authenticator(FixedKeys((KEY,)), required=True)
    signed = authenticator.sign(genuine, target.client.settings.queue)
    elsewhere = authenticator.sign(genuine, "another-queue")
    for text in (signed.replace("[1]", "[2]"), elsewhere):
        target.send_text(text)
        assert "is not signed with a key of this app" in target.reason_for(json.loads(text)["mdstore-mac"])
        target.letters.clear()
    forger = client_of(environ, MDSTORE_SIGNING_KEYS=OTHER)
    sent = forger.app.tasks["echo"].delay("forged")
    assert "is not signed with a key of this app" in target.reason_for(sent.id)
    assert target.client.app.AsyncResult(sent.id).state == "PENDING"


def test_what_the_app_sends_is_signed_on_all_its_ways(target: Target) -> None:
    """The worker executes requests of several lanes, chains, chords, retries, delayed and large messages, and commands."""
    app = target.client.app
    assert target.client.ingest.delay(operations(250)).get(timeout=60)["applied"] == 250
    assert chain(app.tasks["echo"].s(1), app.tasks["echo"].s()).apply_async().get(timeout=60) == 1
    assert chord([app.tasks["echo"].s(n) for n in range(3)], app.tasks["echo"].s()).apply_async().get(timeout=60) == [
        0,
        1,
        2,
    ]
    assert app.tasks["later"].delay().get(timeout=60) == 1
    assert app.tasks["echo"].apply_async((2,), countdown=2).get(timeout=60) == 2
    assert app.tasks["size"].delay("x" * 300_000).get(timeout=60) == 300_000
    assert app.control.inspect(timeout=10).ping()


def test_commands_that_nobody_signed_are_refused(target: Target, environ: Environ) -> None:
    forger = client_of(environ, MDSTORE_SIGNING_KEYS="")
    assert forger.app.control.inspect(timeout=3).ping() is None
    forger.app.control.shutdown()
    nothing_happened(target)
    until(lambda: "the message is not signed" in target.log.read_text())


def test_a_replay_of_a_request_has_no_effect(target: Target, environ: Environ) -> None:
    """A forger who may also receive messages sends a signed one again before, while and after its request is applied."""
    other = environ | {"MDSTORE_QUEUE": f"{target.client.settings.queue}-held"}
    for _ in provision(load_settings(other).settings):
        pass
    held = client_of(other)
    held.submit([{**OPERATION, "entity": "replayed"}], request_id="replayed")
    (body,) = bodies_in(held, held.settings.queue)
    for _ in range(3):
        held.store.aws.sqs.send_message(
            QueueUrl=held.store.aws.sqs.get_queue_url(QueueName=held.settings.queue)["QueueUrl"], MessageBody=body
        )
    with worker(other, target.log, "tests.integration.store_app"):
        until(lambda: held.status("replayed").state is State.COMPLETED)
        held.store.aws.sqs.send_message(
            QueueUrl=held.store.aws.sqs.get_queue_url(QueueName=held.settings.queue)["QueueUrl"], MessageBody=body
        )
        held.submit([{**OPERATION, "entity": "good"}]).wait(timeout=60)
        until(lambda: not bodies_in(held, held.settings.queue))
    assert held.get("replayed", "k").version == 1
    assert held.status("replayed").counts.applied == {"upsert": 1}


def test_a_rotation_by_settings_drops_no_message(environ: Environ, aws: EmbeddedAws, tmp_path: Path) -> None:
    """Messages of the old key wait in the queue, those of the new one follow, and workers know both."""
    rotated = namespace(aws, with_store=True)
    ids = [
        client_of(rotated, MDSTORE_SIGNING_KEYS=keys, JOURNAL=environ["JOURNAL"]).submit(operations(2)).request_id
        for keys in (KEY, f"{OTHER},{KEY}")
    ]
    rotated["MDSTORE_SIGNING_KEYS"] = f"{OTHER},{KEY}"
    with worker(rotated, tmp_path / "worker.log"):
        for request_id in ids:
            assert client_of(rotated).wait(request_id, timeout=60).counts.applied == {"upsert": 2}


def test_a_secret_of_secrets_manager_is_the_key_and_may_be_rotated(aws: EmbeddedAws, tmp_path: Path) -> None:
    """`mdstore provision` makes the secret. A worker that runs during the rotation takes messages of both keys."""
    environ = namespace(aws, with_store=True) | {"MDSTORE_SIGNING_SECRET": f"mdstore/{uuid4()}"}
    settings = load_settings(environ).settings
    made = [created for kind, _, created in provision(settings) if kind == "secret"]
    assert made == [True]
    assert [created for kind, _, created in provision(settings) if kind == "secret"] == [False]
    early = Client(settings)
    with worker(environ, tmp_path / "worker.log"):
        early.submit(operations(2)).wait(timeout=60)
        secrets: Any = early.store.aws.secrets
        secrets.put_secret_value(SecretId=settings.signing_secret, SecretString=OTHER)
        assert early.store.aws.secret_versions(str(settings.signing_secret))[0] == OTHER
        assert early.submit(operations(2)).wait(timeout=60).status().state is State.COMPLETED
    late = Client(settings)
    submission = late.submit(operations(2))
    with worker(environ, tmp_path / "2.log"):
        assert submission.wait(timeout=60).status().state is State.COMPLETED


def test_a_worker_without_a_key_takes_signed_messages(aws: EmbeddedAws, tmp_path: Path) -> None:
    """So producers can be given the key before workers are. Large messages arrive too."""
    environ = namespace(aws, with_store=True) | {"JOURNAL": str(tmp_path / "journal")}
    signing = client_of(environ, MDSTORE_SIGNING_KEYS=KEY)
    with worker(environ, tmp_path / "worker.log", "tests.integration.store_app"):
        signing.submit(operations(2)).wait(timeout=60)
        assert signing.app.tasks["size"].delay("x" * 300_000).get(timeout=60) == 300_000
