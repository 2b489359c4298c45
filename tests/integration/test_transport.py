"""The transport in real workers: which messages they hold, give back, delay and dead-letter."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from pathlib import Path

import pytest
from celery import group
from celery.exceptions import WorkerLostError

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from mdstore.queue.app import SqsApp
from mdstore.queue.broker.publisher import Unsent
from mdstore.settings import load_settings
from tests.integration.test_queue import Environ, dead_letters, namespace, worker
from tests.waiting import until

APP = "tests.integration.transport_app"


@pytest.fixture
def environ(aws: EmbeddedAws) -> Environ:
    """Return the environment of a namespace without the data store's tables."""
    return namespace(aws, with_store=False)


@pytest.fixture
def journal(tmp_path: Path, environ: Environ, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file where tasks record what they do; a message whose lease is not extended is redelivered after 2 s."""
    path = tmp_path / "journal"
    path.touch()
    environ |= {"JOURNAL": str(path), "MDSTORE_VISIBILITY_TIMEOUT": "2", "MDSTORE_TASK_TIME_LIMIT": "60"}
    monkeypatch.setenv("JOURNAL", str(path))
    return path


@pytest.fixture
def app(environ: Environ, journal: Path) -> SqsApp:  # noqa: ARG001
    from tests.integration.transport_app import journaling_app  # noqa: PLC0415  importing it makes an app with default settings

    return journaling_app(load_settings(environ).settings)


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines()


def left(app: SqsApp) -> int:
    """Return how many messages the queue has: visible, hidden or delayed."""
    sqs = app.aws.sqs
    url = sqs.get_queue_url(QueueName=app.settings.queue)["QueueUrl"]
    counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return sum(int(value) for name, value in counts.items() if name.startswith("ApproximateNumberOfMessages"))


def test_a_task_that_runs_five_times_the_visibility_timeout_is_delivered_once(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """While one of two workers runs a task for 10 s, its lease extender keeps the message hidden from both."""
    with worker(environ, tmp_path / "1.log", APP), worker(environ, tmp_path / "2.log", APP):
        result = app.tasks["nap"].delay(10)
        assert result.get(timeout=30) == "rested"
        time.sleep(3)
    assert lines(journal) == ["begins", "ends"]


def test_a_worker_started_in_an_outage_works_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker tries to connect until SQS answers, and then executes tasks."""
    port, log = free_port(), tmp_path / "worker.log"
    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal"))
    made = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "MDSTORE_WAIT_TIME": "1"}
    from tests.integration.transport_app import journaling_app  # noqa: PLC0415  importing it makes an app with default settings

    with EmbeddedAws(port=port, data_dir=tmp_path):
        for _ in provision(load_settings(made).settings):
            pass
    with worker(made, log, APP):
        until(lambda: "Trying to re-establish" in log.read_text())
        with EmbeddedAws(port=port, data_dir=tmp_path):
            result = journaling_app(load_settings(made).settings).tasks["nap"].delay(0)
            assert result.get(timeout=60) == "rested"
    assert "AttributeError" not in log.read_text()  # a closed channel has lost some of its attributes


def test_a_worker_that_is_told_to_stop_loses_and_doubles_nothing(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """A stopping worker gives back the messages it has not begun; otherwise they would stay hidden for ten minutes."""
    environ |= {"MDSTORE_VISIBILITY_TIMEOUT": "600", "MDSTORE_MAX_RECEIVES": "5"}
    touch = app.tasks["touch"]
    group(touch.si(number) for number in range(1_000)).apply_async()
    with worker(environ, tmp_path / "1.log", APP) as process:
        until(lambda: len(lines(journal)) >= 200)
        process.terminate()
        assert process.wait(25) == 0
    done = len(lines(journal))
    assert 200 <= done < 1_000
    with worker(environ, tmp_path / "2.log", APP):
        until(lambda: left(app) == 0)  # no message waits, and no finished task's message will be redelivered
    assert sorted(map(int, lines(journal))) == list(range(1_000))


def test_a_task_that_outlives_the_grace_is_killed_and_its_message_given_back(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """After a grace of 1 s the worker exits with 71, and another worker gets the message at once, not after 600 s."""
    patient = {**environ, "MDSTORE_VISIBILITY_TIMEOUT": "600", "MDSTORE_SHUTDOWN_GRACE": "1"}
    with worker(patient, tmp_path / "1.log", APP) as process:
        result = app.tasks["nap"].delay(6)
        until(lambda: lines(journal) == ["begins"])
        process.terminate()
        assert process.wait(10) == 71
    with worker(environ, tmp_path / "2.log", APP):
        assert result.get(timeout=20) == "rested"
    assert lines(journal) == ["begins", "begins", "ends"]


def test_a_worker_that_is_killed_loses_nothing(app: SqsApp, environ: Environ, journal: Path, tmp_path: Path) -> None:
    """If a worker is killed while a task runs, another worker runs the task again."""
    with worker(environ, tmp_path / "1.log", APP) as process:
        result = app.tasks["nap"].delay(3)
        until(lambda: lines(journal) == ["begins"])
        os.killpg(process.pid, 9)
    with worker(environ, tmp_path / "2.log", APP):
        assert result.get(timeout=30) == "rested"


def test_a_countdown_waits_in_sqs(app: SqsApp, environ: Environ, journal: Path, tmp_path: Path) -> None:
    """SQS delays a message with a countdown of 3 s; no worker receives it before."""
    with worker(environ, tmp_path / "worker.log", APP):
        app.tasks["echo"].delay(1).get(timeout=30)
        began = time.time()
        app.tasks["touch"].apply_async((7,), countdown=3)
        time.sleep(1.5)
        done, log = lines(journal), (tmp_path / "worker.log").read_text()
        if time.time() - began < 3:  # a busy machine may have slept for longer
            assert "7" not in done
            assert "touch" not in log.partition("ready.")[2]  # no worker holds it
        until(lambda: lines(journal) == ["7"])
        assert time.time() - began >= 3


def test_a_retry_waits_in_sqs_too(app: SqsApp, environ: Environ, journal: Path, tmp_path: Path) -> None:
    """A task that retries with a countdown of 2 s runs again after 2 s or more, and its result is that of the second run."""
    with worker(environ, tmp_path / "worker.log", APP):
        assert app.tasks["later"].delay().get(timeout=30) == 1
    first, second = (float(line.rpartition(" ")[2]) for line in lines(journal))
    assert second - first >= 2


def test_a_task_that_kills_its_process_is_dead_lettered_and_fails(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """After two deliveries, the most that are allowed here, its result is WorkerLostError; the worker survives."""
    with worker(environ, tmp_path / "worker.log", APP) as process:
        result = app.tasks["die"].delay()
        with pytest.raises(WorkerLostError):
            result.get(timeout=60)
        (letter,) = dead_letters(app, count=1)
        assert app.tasks["echo"].delay("alive").get(timeout=30) == "alive"
        assert process.poll() is None
    assert lines(journal) == ["dies"] * 2
    assert (letter["task"], letter["receives"]) == ("die", "2")
    assert "WorkerLostError" in letter["reason"]


def test_a_message_that_kills_workers_is_dead_lettered_unexecuted(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """A message that was delivered as often as is allowed, and never acknowledged or rejected, is not executed again."""
    result = app.tasks["nap"].delay(30)
    for number in range(2):
        with worker(environ, tmp_path / f"{number}.log", APP) as process:
            until(lambda number=number: len(lines(journal)) == number + 1)  # type: ignore[misc]
            os.killpg(process.pid, 9)
    with worker(environ, tmp_path / "last.log", APP):
        (letter,) = dead_letters(app, count=1)
        with pytest.raises(Exception, match="delivered 3 times without finishing"):
            result.get(timeout=30)
        assert app.tasks["echo"].delay("alive").get(timeout=30) == "alive"
    assert lines(journal) == ["begins"] * 2
    assert "delivered 3 times without finishing" in letter["reason"]


def test_a_rejected_message_is_dead_lettered_with_its_traceback(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """A task that raises `Reject` runs once, and the reason of its dead letter contains the traceback."""
    with worker(environ, tmp_path / "worker.log", APP):
        app.tasks["refuse"].delay()
        (letter,) = dead_letters(app, count=1)
        time.sleep(3)
    assert lines(journal) == ["refuses"]
    assert "not for me" in letter["reason"]
    assert "in refuse" in letter["reason"]


def test_a_failed_task_is_not_run_again(app: SqsApp, environ: Environ, journal: Path, tmp_path: Path) -> None:
    """The message of a task that raised is acknowledged, and not redelivered."""
    with worker(environ, tmp_path / "worker.log", APP):
        with pytest.raises(ValueError, match="on purpose"):
            app.tasks["fail"].delay().get(timeout=30)
        time.sleep(3)
    assert lines(journal) == ["fails"]


def test_livez_reports_the_workers_health(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    """`/livez` of an idle worker says that nothing is wrong and that it holds no message."""
    port = free_port()
    with worker({**environ, "MDSTORE_WORKER_PORT": str(port)}, tmp_path / "worker.log", APP):
        app.tasks["echo"].delay(1).get(timeout=30)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez") as answer:
            health = json.loads(answer.read())
    assert (health["ok"], health["wrong"], health["held"]) == (True, [], 0)


def test_a_client_without_an_event_loop_can_consume(app: SqsApp) -> None:
    """Kombu's `drain_events` delivers a message, and raises TimeoutError when the queue is empty."""
    queue = app.amqp.queues[app.settings.queue]
    with app.connection_for_read() as connection:
        app.tasks["echo"].delay("hello")
        found = []
        with connection.Consumer([queue], callbacks=[lambda body, message: found.append(body) or message.ack()]):  # type: ignore[func-returns-value]
            connection.drain_events(timeout=5)
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=1.5)
    assert found[0][0] == ["hello"]


def test_a_failed_send_raises(app: SqsApp) -> None:
    """Without its queue a single send, a group and a batch raise `Unsent` and say how many messages were not sent."""
    echo, sqs = app.tasks["echo"], app.aws.sqs
    echo.delay("known")
    sqs.delete_queue(QueueUrl=sqs.get_queue_url(QueueName=app.settings.queue)["QueueUrl"])
    with pytest.raises(Unsent, match="1 of 1 messages were not sent"):
        echo.delay("alone")
    with pytest.raises(Unsent, match="30 of 30 messages were not sent"):
        group(echo.si(number) for number in range(30)).apply_async()
    with pytest.raises(Unsent, match="2 of 2 messages were not sent"):  # noqa: PT012, SIM117
        with app.batched():
            echo.delay("one")
            echo.delay("two")


def test_a_countdown_of_a_day_is_kept_and_moved_when_it_is_due(
    app: SqsApp, environ: Environ, journal: Path, tmp_path: Path
) -> None:
    """A longer delay than SQS allows waits in the table of delayed messages until a worker moves it to its queue."""
    app.tasks["touch"].apply_async((1,), countdown=86_400)
    app.tasks["touch"].apply_async((2,), countdown=902)  # may be moved after 2 s: SQS delays by up to 900 s
    items = app.aws.dynamodb.scan(TableName=app.settings.delayed_table)["Items"]
    assert len([item for item in items if "body" in item]) == 2
    with worker(environ, tmp_path / "worker.log", APP):
        assert until(lambda: _delayed(app) == 1)
    items = app.aws.dynamodb.scan(TableName=app.settings.delayed_table)["Items"]
    assert len([item for item in items if "body" in item]) == 1
    assert lines(journal) == []


def _delayed(app: SqsApp) -> int:
    sqs = app.aws.sqs
    url = sqs.get_queue_url(QueueName=app.settings.queue)["QueueUrl"]
    names = ["ApproximateNumberOfMessagesDelayed"]
    found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]  # type: ignore[arg-type]
    return int(found["ApproximateNumberOfMessagesDelayed"])


def test_arguments_of_three_megabytes_arrive(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    """A task gets an argument of 3 MB whole, three times what an SQS message may hold."""
    with worker(environ, tmp_path / "worker.log", APP):
        large = "x" * 3 * 2**20
        assert app.tasks["size"].delay(large).get(timeout=30) == len(large)


def test_a_queue_app_has_nothing_of_the_data_store(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    """Its namespace has no records and no ledger table, its tasks are its own, and its workers never import the store."""
    tables = app.aws.dynamodb.list_tables(Limit=100)["TableNames"]
    settings = app.settings
    assert settings.results_table in tables
    assert not {settings.records_table, settings.ledger_table} & set(tables)
    assert [name for name in app.tasks if name.startswith("mdstore.")] == []
    with worker(environ, tmp_path / "worker.log", APP):
        assert app.tasks["imported"].delay("mdstore.").get(timeout=30) == []
