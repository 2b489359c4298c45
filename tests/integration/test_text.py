"""Any text that Python holds goes through a real worker: as argument, header, result, error, event, answer and dead letter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord

from mdstore.aws.sqs import Entry
from mdstore.errors import InvalidRequest
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import stop_process
from mdstore.queue.app import SqsApp
from mdstore.queue.broker.envelope import in_one_line
from mdstore.settings import load_settings
from tests.integration.test_queue import ROOT, Environ, dead_letters, namespace
from tests.integration.text_app import ODD_NAMES, text_app
from tests.waiting import until

#: Not in XML 1.0, half of a surrogate pair (as `os.listdir` returns it for a name that is not UTF-8), and beyond 16 bits.
TEXTS = ["\uffff", "a\udcffb", "\ud800", "\x00\x1b", "ü\u2028😀", "\\udcff", "\ude00\ud83d"]


@contextmanager
def worker(environ: Environ, log: Path, *arguments: str) -> Iterator[None]:
    """A worker process of one child."""
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.text_app", "worker", "-l", "INFO", "-c", "1"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        stop_process(process)


@pytest.fixture(scope="module")
def environ() -> Iterator[Environ]:
    """A namespace with a small claim check, so that large texts go through S3, and with a FIFO queue."""
    with EmbeddedAws(port=free_port()) as aws:
        made = {**namespace(aws, with_store=False), "MDSTORE_CLAIM_THRESHOLD": "20000"}
        app = text_app(load_settings(made).settings)
        app.aws.sqs.create_queue(QueueName=f"{app.settings.namespace}.fifo", Attributes={"FifoQueue": "true"})
        yield made


@pytest.fixture(scope="module")
def app(environ: Environ) -> SqsApp:
    return text_app(load_settings(environ).settings)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "worker.log"


@pytest.fixture(scope="module")
def working(environ: Environ, app: SqsApp, log: Path) -> Iterator[None]:
    """A worker of the settings' queue."""
    with worker(environ, log, "-Q", app.settings.queue):
        yield


@pytest.mark.usefixtures("working")
def test_every_text_is_an_argument_and_a_result(app: SqsApp, log: Path) -> None:
    """Alone, as a key, and together in one batch; a message that large goes through S3."""
    echo = app.tasks["echo"]
    with app.batched():
        results = [(text, echo.delay({text: [text]})) for text in TEXTS]
        results += [(text, echo.delay({text: [text] * 9_000})) for text in TEXTS[:2]]
    for text, result in results:
        found = result.get(timeout=60)
        assert list(found) == [text]
        assert set(found[text]) == {text}
    assert "Logging error" not in log.read_text()


@pytest.mark.usefixtures("working")
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_text_goes_through_chains_links_and_chords(app: SqsApp, text: str) -> None:
    """The results of the parts become arguments of what follows them."""
    echo = app.tasks["echo"]
    assert chain(echo.s(text), echo.s(), echo.s()).apply_async().get(timeout=60) == text
    linked = echo.s().set(task_id=f"linked-{TEXTS.index(text)}")
    echo.apply_async((text,), link=linked)
    assert app.AsyncResult(f"linked-{TEXTS.index(text)}").get(timeout=60) == text
    assert chord([echo.s(text), echo.s(text)], echo.s()).apply_async().get(timeout=60) == [text, text]


@pytest.mark.usefixtures("working")
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_text_is_a_header(app: SqsApp, text: str) -> None:
    """As another name, a stamp, and a header of the caller's own; also while the message waits in the table.

    A name is one line, so its control characters are escaped.
    """
    options = {"shadow": text, "headers": {"own": text}, "stamped_headers": ["stamp"], "stamp": text}
    found = app.tasks["headers"].apply_async(**options).get(timeout=60)
    assert found == [in_one_line(text), {"stamp": text}, text]
    later = datetime.now(UTC) + timedelta(hours=1)
    app.tasks["headers"].apply_async(eta=later, **options)


@pytest.mark.usefixtures("working")
def test_every_text_is_an_error_an_event_and_an_answer(app: SqsApp) -> None:
    """Who waits gets the error, who listens the event, and `celery inspect active` the arguments."""
    failed: dict[str, dict[str, Any]] = {}
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(
            connection, handlers={"task-failed": lambda event: failed.update({event["uuid"]: event})}
        )
        with receiver.consumer_context(wakeup=False) as (listening, _, _):
            results = {text: app.tasks["fail"].delay(text) for text in TEXTS}
            for text, result in results.items():
                with pytest.raises(ValueError, match=re.compile(".", re.DOTALL)) as raised:
                    result.get(timeout=60)
                assert raised.value.args == (text,)

            def heard() -> bool:
                with suppress(TimeoutError):
                    listening.drain_events(timeout=5)
                return len(failed) == len(TEXTS)

            until(heard)
    app.topics.remove(receiver.queue.name)
    for text, result in results.items():
        assert failed[result.id]["exception"] == f"ValueError({text!r})"

    for text in TEXTS:
        waiting = app.tasks["wait"].delay(text, 4)
        answers: list[Any] = []

        def active(answers: list[Any] = answers, text: str = text) -> bool:
            answer = app.control.inspect(limit=1, timeout=5).active() or {}
            answers.extend(task for tasks in answer.values() for task in tasks if task["args"] == [text, 4])
            return bool(answers)

        until(active)
        assert waiting.get(timeout=60) == text


@pytest.mark.usefixtures("working")
def test_every_text_of_a_dead_letter_comes_back(app: SqsApp) -> None:
    """The letter is the message; sent again to its queue it is the same task."""
    for text in TEXTS:
        app.send_task("nobody knows", (text,), shadow=text)
    letters = dead_letters(app, count=len(TEXTS))
    assert sorted(json.loads(json.loads(one["body"])["body"])[0][0] for one in letters) == sorted(TEXTS)
    url = app.aws.queues.url(app.settings.queue)
    (failed,) = app.aws.queues.send(url, [Entry(message_body=letters[0]["body"])])
    assert failed is None
    dead_letters(app, count=1)


def test_a_text_that_is_part_of_a_key_is_refused_where_it_is_sent(app: SqsApp) -> None:
    """Results and chords are stored under ids, which must be Unicode; so must what SQS itself reads."""
    echo = app.tasks["echo"]
    with pytest.raises(InvalidRequest, match=r"id='a\\udcffb': expected valid Unicode"):
        echo.apply_async((1,), task_id="a\udcffb")
    with pytest.raises(InvalidRequest, match=r"task='a\\udcffb': expected valid Unicode"):
        app.send_task("a\udcffb")
    attributes = {"who": {"DataType": "String", "StringValue": "\uffff"}}
    with pytest.raises(InvalidRequest, match=r"message_attributes\['who'\]: expected characters that SQS accepts"):
        echo.apply_async((1,), message_attributes=attributes)


def test_tasks_of_any_name_go_through_a_fifo_queue(app: SqsApp, environ: Environ, log: Path) -> None:
    """Each in a group of its own; a name that SQS takes is the group itself, as before."""
    queue = f"{app.settings.namespace}.fifo"
    results = [(name, app.tasks[name].apply_async((name,), queue=queue)) for name in ODD_NAMES]
    with worker(environ, log.with_name("fifo.log"), "-Q", queue):
        for name, result in results:
            assert result.get(timeout=60) == name


def test_an_id_that_sqs_refuses_is_refused_by_name(app: SqsApp) -> None:
    """An id that the caller chose is sent as it is, or not at all."""
    queue = f"{app.settings.namespace}.fifo"
    for field in ("MessageGroupId", "MessageDeduplicationId"):
        for value in ("Köln", "two words", "x" * 129, 7):
            with pytest.raises(InvalidRequest, match=f"{field}: expected 1-128 ASCII"):
                app.tasks["echo"].apply_async((1,), queue=queue, **{field: value})
