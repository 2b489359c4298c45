"""Small requests in a real worker: they run side by side in jobs, and each message still ends on its own account."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import State
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from mdstore.tasks.ingest import OPERATIONS
from tests.integration.test_queue import Environ, dead_letters, namespace, worker
from tests.waiting import until

APP = "tests.integration.jobs_app"


@pytest.fixture
def environ(aws: EmbeddedAws, tmp_path: Path) -> Environ:
    made = namespace(aws, with_store=True)
    return made | {"JOURNAL": str(tmp_path / "journal"), "MDSTORE_MAX_RECEIVES": "5"}


@pytest.fixture
def client(environ: Environ) -> Client:
    return Client(load_settings(environ).settings)


def submit(client: Client, *names: str) -> None:
    """Submit a request of one operation under each name, which is its key, too. One after the other, they share no message."""
    for name in names:
        op = "patch" if name.startswith("patch") else "insert"
        client.submit([{"op": op, "entity": "thing", "key": name, "data": {"name": name}}], request_id=name)


def jobs(environ: Environ) -> list[int]:
    """Return the sizes of the jobs so far."""
    journal = Path(environ["JOURNAL"])
    return [int(size) for size in journal.read_text().split()] if journal.exists() else []


def all_done(client: Client, names: list[str]) -> None:
    """Wait until all requests are completed. Each must have been applied once."""
    waiting = set(names)

    def done() -> bool:
        found = client.store.ledger.get_many(sorted(waiting))
        waiting.difference_update(name for name, one in found.items() if one.state is State.COMPLETED)
        return not waiting

    until(done, within=90, what=f"{len(waiting)} requests are completed")
    records = client.store.records.look_up(("thing", name) for name in names)
    assert Counter(one.version for one in records.values()) == {1: len(names)}
    assert {client.status(name).counts.total for name in names} == {1}


@contextmanager
def listening(app: SqsApp) -> Iterator[Callable[[str, int], set[str]]]:
    """Collect the events of tasks inside the context.

    Yields a function that waits for a number of events of a type, and returns the ids of their tasks.
    """
    found: dict[str, list[str]] = defaultdict(list)
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(
            connection, handlers={"*": lambda event: found[event["type"]].append(event.get("uuid", ""))}
        )
        with receiver.consumer_context(wakeup=False) as (channel, _, _):

            def heard(kind: str, count: int) -> set[str]:
                def enough() -> bool:
                    with suppress(TimeoutError):
                        channel.drain_events(timeout=1)
                    return len(found[kind]) >= count

                until(enough, what=f"{count} events {kind}")
                assert len(found[kind]) == count
                return set(found[kind])

            yield heard
    app.topics.remove(receiver.queue.name)


def test_many_small_requests_are_applied_once_each_beside_a_forged_one(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    """All succeed in jobs, with the same events as any task; the forged message among them is dead-lettered alone."""
    names = [f"k{number}" for number in range(200)]
    submit(client, *names[:100])
    good = client.status("k0").reference
    forged = msgspec.to_builtins(msgspec.structs.replace(good, digest="0" * 64))
    client.app.send_task("mdstore.ingest", (forged,), task_id="forged", headers={OPERATIONS: 1})
    submit(client, *names[100:])
    with listening(client.app) as heard, worker(environ, tmp_path / "log", APP, "-c", "2"):
        all_done(client, names)
        (letter,) = dead_letters(client.app, count=1)
        for kind in ("task-received", "task-started"):
            assert heard(kind, len(names) + 1) == {*names, "forged"}
        assert heard("task-succeeded", len(names)) == set(names)
    assert "does not have the digest" in letter["reason"]
    sizes = jobs(environ)
    assert max(sizes) > 8
    assert sum(sizes) > 100
    log = (tmp_path / "log").read_text()
    for name in names:
        assert log.count(f"Task mdstore.ingest[{name}] received") == 1
        assert log.count(f"Task mdstore.ingest[{name}] succeeded") == 1
    assert "no task works on" not in log


def test_a_job_whose_process_is_killed_is_delivered_again(client: Client, environ: Environ, tmp_path: Path) -> None:
    """Some of its requests were completed, some applied, and some not begun: none is lost, and none applied twice."""
    names = [f"k{number}" for number in range(100)]
    submit(client, *names)
    died = tmp_path / "died"
    with worker(environ | {"DIE_AT": "12", "DIED": str(died)}, tmp_path / "log", APP):
        all_done(client, names)
        until(lambda: _left(client) == 0, within=60)
    assert died.exists()
    log = (tmp_path / "log").read_text()
    again = [name for name in names if log.count(f"Task mdstore.ingest[{name}] received") == 2]
    assert 2 <= len(again) <= 32


def test_a_stopping_worker_gives_back_the_requests_that_it_has_not_begun(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    """Those that wait for a free process, too: another worker gets them at once, and not after the visibility timeout."""
    names = [f"k{number}" for number in range(300)]
    submit(client, *names)
    environ |= {"MDSTORE_VISIBILITY_TIMEOUT": "600"}
    with worker(environ, tmp_path / "1.log", APP):
        until(lambda: sum(jobs(environ)) > 32)
    assert any(one.state is not State.COMPLETED for one in client.store.ledger.get_many(names).values())
    with worker(environ, tmp_path / "2.log", APP):
        all_done(client, names)


def _left(client: Client) -> int:
    """Return the number of messages in the queue, visible or not."""
    sqs: Any = client.store.aws.sqs
    url = sqs.get_queue_url(QueueName=client.settings.queue)["QueueUrl"]
    kinds = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")
    found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=list(kinds))["Attributes"]
    return sum(int(found[kind]) for kind in kinds)


def test_a_refused_operation_is_the_outcome_of_its_own_request(
    client: Client, environ: Environ, tmp_path: Path
) -> None:
    names = [f"k{number}" for number in range(20)]
    submit(client, *names, *(f"patch{number}" for number in range(20)))
    with worker(environ, tmp_path / "log", APP):
        all_done(client, names)
        for number in range(20):
            assert client.wait(f"patch{number}").counts.refused == {"missing": 1}
    assert max(jobs(environ)) > 4


def test_a_rate_limit_holds_for_small_requests(client: Client, environ: Environ, tmp_path: Path) -> None:
    """Celery's limit lets one message pass at a time, so they do not gather."""
    names = [f"k{number}" for number in range(20)]
    submit(client, *names)
    with worker(environ | {"RATE": "10/s"}, tmp_path / "log", APP):
        until(lambda: client.store.ledger.get("k0").state is State.COMPLETED or _completed(client, names))
        began = time.monotonic()
        all_done(client, names)
    assert time.monotonic() - began > 1.0


def _completed(client: Client, names: list[str]) -> bool:
    return any(one.state is State.COMPLETED for one in client.store.ledger.get_many(names).values())


def test_revoking_does_not_stop_accepted_requests(client: Client, environ: Environ, tmp_path: Path) -> None:
    """Nothing that was accepted is lost, in a job as elsewhere."""
    names = [f"k{number}" for number in range(40)]
    with worker(environ, tmp_path / "log", APP):
        until(lambda: client.app.control.revoke(names, reply=True, timeout=5, limit=1), what="the worker listens")
        submit(client, *names)
        all_done(client, names)


def test_callers_of_celery_get_their_results(client: Client, environ: Environ, tmp_path: Path) -> None:
    """The results of a job's tasks are stored; those of `submit`, which nobody reads, are not."""
    results = [
        client.ingest.delay(
            [{"op": "insert", "entity": "thing", "key": f"d{number}", "data": {}}], request_id=f"d{number}"
        )
        for number in range(40)
    ]
    submit(client, *(f"k{number}" for number in range(40)))
    with worker(environ, tmp_path / "log", APP):
        assert [one.get(timeout=60)["applied"] for one in results] == [1] * 40
        all_done(client, [f"k{number}" for number in range(40)])
        metas = client.app.backend.metas([f"{kind}{number}" for kind in "dk" for number in range(40)])
        until(lambda: len(client.app.backend.metas(f"d{number}" for number in range(40))) == 40)
    assert not [name for name in metas if name.startswith("k")]
    assert max(jobs(environ)) > 8


def test_messages_without_the_hint_run_alone(client: Client, environ: Environ, tmp_path: Path) -> None:
    """Those of an earlier release have none."""
    names = [f"k{number}" for number in range(10)]
    for name in names:
        operations = [{"op": "insert", "entity": "thing", "key": name, "data": {"name": name}}]
        accepted = client.store.ingestor.accept(operations, publish=lambda _: None, request_id=name)
        message = msgspec.to_builtins(accepted.reference)
        client.app.send_task("mdstore.ingest", (message,), task_id=name)
    with worker(environ, tmp_path / "log", APP):
        all_done(client, names)
    assert jobs(environ) == []


def test_a_message_that_lies_about_its_size_is_executed_all_the_same(environ: Environ, tmp_path: Path) -> None:
    """The process sees the true size before it applies anything, and then runs the task as any other."""
    environ |= {"MDSTORE_LANE_OPERATIONS": "1000"}
    client = Client(load_settings(environ).settings)
    names = [f"k{number}" for number in range(20)]
    operations = [{"op": "insert", "entity": "large", "key": f"l{number}", "data": {}} for number in range(101)]
    submit(client, *names[:10])
    large = client.store.ingestor.accept(operations, publish=lambda _: None, request_id="large")
    message = msgspec.to_builtins(large.reference)
    client.app.send_task("mdstore.ingest", (message,), task_id="large", headers={OPERATIONS: 1})
    submit(client, *names[10:])
    with worker(environ, tmp_path / "log", APP):
        all_done(client, names)
        assert client.wait("large").counts.applied == {"insert": 101}
