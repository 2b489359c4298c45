"""Remote control and events over SNS, with two real worker processes and the clients that command and watch them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from celery.exceptions import TaskRevokedError

from mdstore.aws.clients import AwsClients
from mdstore.errors import ConfigurationError
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import kill_group, stop_process
from mdstore.provision import provision
from mdstore.queue.app import SqsApp
from mdstore.queue.control.broadcasts import wrap
from mdstore.queue.control.reaper import ORPHANED_AFTER, remove_stale_queues
from mdstore.queue.control.topics import SEEN_TAG, Topics
from mdstore.settings import load_settings
from tests.integration.plain_app import plain_app
from tests.waiting import until

ROOT = Path(__file__).parents[2]
Environ = dict[str, str]
NODES = ("one@here", "two@here")


@contextmanager
def worker(environ: Environ, log: Path, node: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker with two pool processes."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tests.integration.plain_app", "worker", "-l", "INFO", "-c", "2",
             "-n", node],
            cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        stop_process(process)


@pytest.fixture(scope="module")
def environ() -> Iterator[Environ]:
    """Yield the environment of a provisioned namespace."""
    with EmbeddedAws(port=free_port()) as aws:
        made = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": f"fan-{uuid4().hex[:12]}",
            "MDSTORE_WAIT_TIME": "1",
            "AWS_ACCESS_KEY_ID": "sentinel-key",
            "AWS_SECRET_ACCESS_KEY": "sentinel-secret",
        }
        for _ in provision(load_settings(made).settings, with_store=False):
            pass
        yield made


@pytest.fixture(scope="module")
def app(environ: Environ) -> SqsApp:
    """Return the app as a client that polls for 10 s, as long as a client on AWS does."""
    return plain_app(load_settings({**environ, "MDSTORE_WAIT_TIME": "10"}).settings)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def workers(environ: Environ, app: SqsApp, logs: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run two workers; yields their processes by node name once both answer."""
    with worker(environ, logs / "one", NODES[0]) as one, worker(environ, logs / "two", NODES[1]) as two:
        until(lambda: len(ping(app, timeout=2)) == 2)
        yield dict(zip(NODES, (one, two), strict=True))


def ping(app: SqsApp, **options: Any) -> dict[str, Any]:
    return app.control.inspect(**{"limit": 2, "timeout": 20, **options}).ping() or {}


def queues(topics: Topics) -> set[str]:
    """Return the SQS names of all queues of the namespace except the task queues."""
    return set(topics.listed())


def celery(environ: Environ, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of Celery's own commands."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tests.integration.plain_app", *arguments],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.usefixtures("workers")
def test_every_worker_answers(app: SqsApp, environ: Environ) -> None:
    """`celery inspect ping` and `celery status` show both workers, end within their timeout, and leave no queue behind."""
    before = queues(app.topics)
    began = time.monotonic()
    assert ping(app) == {node: {"ok": "pong"} for node in NODES}
    assert time.monotonic() - began < 15  # both answers arrive long before the timeout of 20 s
    assert set(ping(app, destination=[NODES[0]])) == {NODES[0]}
    began = time.monotonic()
    assert ping(app, destination=["nobody@here"], timeout=2) == {}
    assert 2 <= time.monotonic() - began < 10
    assert queues(app.topics) == before

    for command in (["inspect", "ping", "--timeout", "2"], ["status", "--timeout", "2"]):
        answer = celery(environ, *command)
        assert answer.returncode == 0, answer.stderr
        assert "2 nodes online." in answer.stdout
    assert queues(app.topics) == before


def test_a_task_may_ask_too(app: SqsApp, workers: dict[str, subprocess.Popen[bytes]]) -> None:
    """A task can ping all workers, and afterwards the workers' event loops use hardly any processor time."""
    for _ in range(4):
        assert app.tasks["ask"].delay().get(timeout=60) == sorted(NODES)
    time.sleep(1)
    before = [sum(psutil.Process(one.pid).cpu_times()[:2]) for one in workers.values()]
    time.sleep(3)
    after = [sum(psutil.Process(one.pid).cpu_times()[:2]) for one in workers.values()]
    assert all(late - early < 1.0 for early, late in zip(before, after, strict=True))


@pytest.mark.usefixtures("workers")
def test_inspection_shows_the_workers_and_no_secret(app: SqsApp, logs: Path) -> None:
    """Every inspection answers in JSON, even where Celery returns objects; no AWS secret is in an answer or in a log."""
    found = {
        method: getattr(app.control.inspect(timeout=5, limit=2), method)()
        for method in ("stats", "conf", "active_queues", "registered", "active", "reserved", "scheduled", "revoked")
    }
    for method, answers in found.items():
        assert set(answers) == set(NODES), method
    assert found["stats"][NODES[0]]["pool"]["max-concurrency"] == 2
    assert "nap" in found["registered"][NODES[1]]
    assert "sentinel-secret" not in json.dumps(found)
    assert not any("sentinel-secret" in log.read_text() for log in logs.iterdir())


def test_the_pool_grows_and_shrinks(app: SqsApp, workers: dict[str, subprocess.Popen[bytes]]) -> None:
    """`pool_grow` adds a process to one worker and `pool_shrink` removes it again, by Celery's own count."""

    def processes() -> list[int]:
        stats = app.control.inspect(timeout=5, limit=2).stats() or {}
        return [len(stats[node]["pool"]["processes"]) for node in workers if node in stats]

    until(lambda: processes() == [2, 2])  # a terminated process is replaced
    reply = app.control.pool_grow(1, destination=[NODES[0]], reply=True, timeout=5)
    assert reply == [{NODES[0]: {"ok": "pool will grow"}}]
    until(lambda: processes() == [3, 2])
    app.control.pool_shrink(1, destination=[NODES[0]], reply=True, timeout=5)
    until(lambda: processes() == [2, 2])


@pytest.mark.usefixtures("workers")
def test_a_revoked_task_does_not_run(app: SqsApp) -> None:
    """A task revoked before its message arrived ends REVOKED on either worker; a running task is terminated."""
    waiting, running = str(uuid4()), str(uuid4())
    app.control.revoke(waiting)
    until(
        lambda: all(waiting in ids for ids in (app.control.inspect(timeout=5, limit=2).revoked() or {"": []}).values())
    )
    result = app.tasks["add"].apply_async((1, 1), task_id=waiting)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=30)

    result = app.tasks["nap"].apply_async((60,), task_id=running)
    until(lambda: any(app.control.inspect(timeout=5, limit=2).active().values()))
    app.control.revoke(running, terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=30)


@pytest.mark.usefixtures("workers")
def test_a_rate_limit_holds(app: SqsApp) -> None:
    """At one per second and worker, 6 tasks take two seconds or more; without the limit they take less."""

    def seconds() -> float:
        began = time.monotonic()
        for result in [app.tasks["add"].delay(n, n) for n in range(6)]:
            result.get(timeout=60)
        return time.monotonic() - began

    answers = app.control.rate_limit("add", "1/s", reply=True, timeout=5, limit=2)
    assert sorted(node for answer in answers for node in answer) == list(NODES)
    assert all("new rate limit set" in answer["ok"] for one in answers for answer in one.values())
    limited = seconds()
    app.control.rate_limit("add", 0, reply=True, timeout=5, limit=2)
    assert limited >= 2
    assert seconds() < limited


def test_a_stale_or_malformed_command_is_not_executed(
    app: SqsApp, environ: Environ, workers: dict[str, subprocess.Popen[bytes]], logs: Path
) -> None:
    """Commands that expired or have no expiry, and messages that are no commands, are logged, deleted and never executed."""
    aws = AwsClients(load_settings(environ).settings)
    command: dict[str, Any] = {
        "method": "shutdown",
        "arguments": {},
        "destination": None,
        "pattern": None,
        "matcher": None,
    }

    def message(headers: dict[str, Any], body: Any = command) -> str:
        return json.dumps({**json.loads(wrap(json.dumps(body))), "headers": headers})

    bad = [
        message({"expires": time.time() - 60}),
        message({}),
        message({"expires": time.time() + 60}, {**command, "pattern": 5}),
        json.dumps({"task": "mdstore.ingest"}),
        "shutdown",
    ]
    for name, _ in list(app.topics.subscribed()):
        url = aws.sqs.get_queue_url(QueueName=name)["QueueUrl"]
        for text in bad:
            aws.sqs.send_message(QueueUrl=url, MessageBody=text)
    for name in ("one", "two"):
        until(lambda name=name: (logs / name).read_text().count("refused: ") >= len(bad))  # type: ignore[misc]
        assert "is stale" in (logs / name).read_text()

    assert len(ping(app)) == 2
    assert [process.poll() for process in workers.values()] == [None, None]
    letters = aws.sqs.get_queue_url(QueueName=load_settings(environ).settings.dead_letter_queue)["QueueUrl"]
    assert "Messages" not in aws.sqs.receive_message(QueueUrl=letters)


def test_a_restarted_worker_ignores_commands_sent_before_its_start(
    app: SqsApp, environ: Environ, tmp_path: Path
) -> None:
    """A shutdown sent while a worker was dead does not end the next worker of that name; a later one does, with exit code 0."""
    node, log = "three@here", tmp_path / "three"
    before = queues(app.topics)
    with worker(environ, log, node) as process:
        until(lambda: ping(app, destination=[node], limit=1, timeout=2))
        kill_group(process)
    left = queues(app.topics) - before
    assert len(left) == 1  # the queue of the killed worker, which still receives commands
    app.control.shutdown(destination=[node])
    with worker(environ, log, node) as process:
        until(lambda: ping(app, destination=[node], limit=1, timeout=2))
        assert process.poll() is None
        assert "Got shutdown from remote" not in log.read_text()
        app.control.shutdown(destination=[node])
        assert process.wait(30) == 0
    assert queues(app.topics) - before == left  # a worker that shuts down removes its own queue


def test_stale_queues_are_removed_and_others_are_not(
    app: SqsApp, environ: Environ, workers: dict[str, subprocess.Popen[bytes]]
) -> None:
    """The reaper removes queues and subscriptions of owners gone for 16 minutes, and none that are live, young or foreign."""
    aws = AwsClients(load_settings(environ).settings)
    topics = app.topics
    before = dict(topics.subscribed())
    assert len(before) >= len(workers)
    old = str(int(time.time() - ORPHANED_AFTER - 5))

    def made(queue: str, tags: dict[str, str]) -> str:
        another = Topics(load_settings(environ).settings, lambda: aws)
        another.create(queue)
        if another.kind_of(queue) != "reply":
            another.subscribe(queue)
        aws.sqs.tag_queue(QueueUrl=another.url(queue), Tags=tags)
        return another.name_of(queue)

    dead = {
        made(f"gone@here.{topics.control_exchange}", {SEEN_TAG: old}),
        made(f"{topics.events}.{uuid4()}", {SEEN_TAG: old}),
    }
    reply = made(topics.reply_queue("0" * 20), {SEEN_TAG: old})
    foreign = made(f"{topics.events}.{uuid4()}", {SEEN_TAG: old, "mdstore:namespace": "another"})
    young = made(f"{topics.events}.{uuid4()}", {})
    stranger = f"{topics.events}-stranger"
    url = aws.sqs.create_queue(QueueName=stranger)["QueueUrl"]
    arn = aws.arn("sqs", stranger, queue_url=url)
    aws.sns.subscribe(TopicArn=aws.arn("sns", topics.events, queue_url=url), Protocol="sqs", Endpoint=arn)
    deleted = made(f"{topics.events}.{uuid4()}", {})
    aws.sqs.delete_queue(QueueUrl=aws.sqs.get_queue_url(QueueName=deleted)["QueueUrl"])

    assert set(remove_stale_queues(topics)) == {*dead, deleted}
    assert set(remove_stale_queues(topics, listing=True)) == {reply}
    assert remove_stale_queues(topics, listing=True) == []
    assert set(dict(topics.subscribed())) == {*before, foreign, young, stranger}
    assert {foreign, young, stranger} <= queues(topics)
    assert not queues(topics) & {*dead, reply}
    for name in (foreign, young, stranger):
        topics.discard(name, dict(topics.subscribed())[name])
    assert len(ping(app)) == 2


@pytest.mark.usefixtures("workers")
def test_events_are_complete_and_published_once_a_second(app: SqsApp) -> None:
    """Each of 100 tasks has its received, started and succeeded event; a worker publishes once a second, not per event."""
    topics, queue = app.topics, f"{app.topics.events}.{uuid4()}"
    topics.create(queue)
    topics.subscribe(queue)
    began = time.monotonic()
    results = [app.tasks["add"].delay(n, n) for n in range(100)]
    for result in results:
        result.get(timeout=60)
    seconds = time.monotonic() - began
    ids = {str(result) for result in results}  # events of earlier tasks may still arrive
    found: Counter[tuple[str, str]] = Counter()
    messages = 0

    def received() -> bool:
        nonlocal messages
        answer = app.aws.sqs.receive_message(QueueUrl=topics.url(queue), MaxNumberOfMessages=10, WaitTimeSeconds=1)
        for message in answer.get("Messages", []):
            events = json.loads(json.loads(message["Body"])["body"])
            messages += 1
            found.update((event["type"], event["uuid"]) for event in events if event.get("uuid") in ids)
        return len(found) >= 300

    until(received)
    topics.remove(queue)
    print(f"{messages} publishes for {sum(found.values())} events in {seconds:.1f} s")
    assert found == Counter(
        {(f"task-{state}", task_id): 1 for state in ("received", "started", "succeeded") for task_id in ids}
    )
    assert messages <= 2 * (seconds + 3)


@pytest.mark.usefixtures("workers")
def test_a_client_publishes_its_own_events(environ: Environ) -> None:
    """With `task_send_sent_event` on, a client's `task-sent` event reaches Celery's own event receiver."""
    app = plain_app(load_settings(environ).settings)
    app.conf.task_send_sent_event = True
    found: list[dict[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-sent": found.append})
        with receiver.consumer_context(wakeup=False) as (listening, _, _):
            result = app.tasks["add"].delay(1, 1)
            until(lambda: found or listening.drain_events(timeout=5))
    app.topics.remove(receiver.queue.name)
    assert [event["uuid"] for event in found] == [result.id]
    assert result.get(timeout=30) == 2


def test_a_worker_works_without_topics(environ: Environ, tmp_path: Path) -> None:
    """If the topics are missing, a worker logs what to do, and executes its tasks anyway."""
    bare_environ = {**environ, "MDSTORE_NAMESPACE": f"bare-{uuid4().hex[:8]}"}
    settings = load_settings(bare_environ).settings
    aws = AwsClients(settings)
    for _ in provision(settings):
        pass
    url = aws.sqs.get_queue_url(QueueName=settings.queue)["QueueUrl"]
    for topic in (settings.control_topic, settings.events_topic):
        aws.sns.delete_topic(TopicArn=aws.arn("sns", topic, queue_url=url))
    log = tmp_path / "bare"
    with worker(bare_environ, log, "bare@here"):
        bare = plain_app(settings)
        assert bare.tasks["add"].delay(2, 3).get(timeout=60) == 5
    assert "remote control does not work until this is fixed" in log.read_text()
    assert list(Topics(settings, lambda: aws).listed()) == []


def test_remote_control_can_be_off(environ: Environ) -> None:
    """With remote control off, an inspection raises ConfigurationError instead of waiting for answers."""
    app = plain_app(load_settings({**environ, "MDSTORE_REMOTE_CONTROL": "false"}).settings)
    with pytest.raises(ConfigurationError, match="remote_control"):
        app.control.inspect().ping()
