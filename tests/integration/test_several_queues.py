"""Real workers of several queues: each queue is served, idle and loaded, with shares by weight."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mdstore.local.emulator import EmbeddedAws
from mdstore.local.stack import stop_process
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.integration.test_queue import ROOT, Environ, namespace
from tests.waiting import until

QUEUES = 20


@contextmanager
def worker(environ: Environ, log: Path, queues: list[str], *, processes: int = 1) -> Iterator[None]:
    """A worker of some queues, in this order."""
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.queues_app", "worker", "-l", "INFO"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "-c", str(processes), "-Q", ",".join(queues)],
            cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: " ready." in log.read_text())
        yield
    finally:
        stop_process(process)


@pytest.fixture
def environ(aws: EmbeddedAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environ:
    """A namespace of twenty queues, with the longest polls that SQS has."""
    made = namespace(aws, with_store=False)
    made |= {"JOURNAL": str(tmp_path / "journal"), "QUEUES": str(QUEUES), "MDSTORE_WAIT_TIME": "20"}
    made |= {"MDSTORE_VISIBILITY_TIMEOUT": "120", "MDSTORE_EVENTS": "false", "MDSTORE_REMOTE_CONTROL": "false"}
    (tmp_path / "journal").touch()
    for name in ("JOURNAL", "QUEUES"):
        monkeypatch.setenv(name, made[name])
    return made


@pytest.fixture
def app(environ: Environ) -> SqsApp:
    from tests.integration.queues_app import names, queues_app  # noqa: PLC0415  importing it makes an app of the defaults

    made = queues_app(load_settings(environ).settings)
    for name in names(made.settings)[1:]:
        made.aws.sqs.create_queue(QueueName=name)
    return made


def queues(app: SqsApp) -> list[str]:
    return [queue.name for queue in app.conf.task_queues]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_idle_worker_serves_both_of_its_queues(
    app: SqsApp, environ: Environ, tmp_path: Path, processes: int, reverse: bool
) -> None:
    used = queues(app)[:2]
    order = list(reversed(used)) if reverse else used
    with worker(environ, tmp_path / "log", order, processes=processes):
        time.sleep(2)  # now each queue is being polled, for twenty seconds
        for queue in used:
            began = time.monotonic()
            assert app.tasks["add"].apply_async((1, 1), queue=queue).get(timeout=30) == 2
            assert time.monotonic() - began < 12


@pytest.mark.parametrize("prefetch", [1, 10])
def test_an_idle_worker_of_one_process_serves_twenty_queues(
    app: SqsApp, environ: Environ, tmp_path: Path, prefetch: int
) -> None:
    with worker(environ | {"MDSTORE_PREFETCH": str(prefetch)}, tmp_path / "log", queues(app)):
        sent = [app.tasks["add"].apply_async((1, 1), queue=queue) for queue in queues(app)]
        assert [one.get(timeout=60) for one in sent] == [2] * QUEUES
        last = app.tasks["add"].apply_async((1, 2), queue=queues(app)[-1])
        assert last.get(timeout=30) == 3


def test_a_backlog_of_one_queue_does_not_hold_up_another(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    one, other = queues(app)[:2]
    with app.batched():
        for _ in range(300):
            app.tasks["origin"].apply_async((0.1,), queue=one)
    with worker(environ, tmp_path / "log", [one, other]):
        until(lambda: len((tmp_path / "journal").read_text().splitlines()) > 20)
        assert app.tasks["add"].apply_async((1, 1), queue=other).get(timeout=30) == 2
        assert len((tmp_path / "journal").read_text().splitlines()) < 250


def test_shares_of_a_loaded_worker_follow_the_weights(app: SqsApp, environ: Environ, tmp_path: Path) -> None:
    used = queues(app)[:3]
    with app.batched():
        for queue in used:
            for _ in range(200):
                app.tasks["origin"].apply_async((0.02,), queue=queue)
    weights = {"MDSTORE_QUEUE_WEIGHTS": f"{used[1]}=3"}
    notes = tmp_path / "journal"
    with worker(environ | weights, tmp_path / "log", used):
        until(lambda: len(notes.read_text().splitlines()) >= 250, within=120)
    done = Counter(notes.read_text().splitlines()[50:250])
    assert done[used[1]] == pytest.approx(120, abs=30)
    assert done[used[0]] == pytest.approx(40, abs=20)
    assert done[used[2]] == pytest.approx(40, abs=20)
