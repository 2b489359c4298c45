"""The examples, run by the commands of their own READMEs: real workers, beat and uvicorn over the embedded AWS."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from mdstore.local.emulator import free_port
from mdstore.local.stack import Stack, stop_process
from mdstore.queue import create_app
from mdstore.queue.app import SqsApp
from mdstore.settings import load_settings
from tests.acceptance.curl import BASH_FUNCTION
from tests.waiting import until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
Environ = Mapping[str, str]


def blocks(example: str, language: str) -> list[str]:
    """Return the code blocks in `language` of an example's README, with continued lines joined."""
    text = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block) for block in found]


def user_environ(stack: Stack, **more: str) -> dict[str, str]:
    """Return the environment of a user of `stack` whose virtual environment is active."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**stack.environ, "PATH": path, **more}


def run(command: str, environ: Environ) -> str:
    """Run a shell command in the repository's root; returns what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=dict(environ), cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def running(command: str, environ: Environ, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell command as a process of its own; it must not end before it is stopped."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            env=dict(environ), cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
        assert process.poll() is None, f"{command}\n{log.read_text()}"
    finally:
        stop_process(process)


# -- the plain Celery app


@dataclass(frozen=True, kw_only=True)
class Shop:
    """The running example: its producer's output, the logs of its workers, and an app that sends to its queues."""

    printed: str
    orders_log: Path
    reports_log: Path
    sender: SqsApp

    def attributes(self, queue: str) -> dict[str, Any]:
        """Return those attributes of a queue that a deployment sets."""
        sqs = self.sender.aws.sqs
        url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
        found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        decided = ("VisibilityTimeout", "MessageRetentionPeriod", "RedrivePolicy")
        return {name: json.loads(value) for name, value in found.items() if name in decided}


@pytest.fixture(scope="module")
def shop(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Run the README's commands: deployment first, then workers and beat side by side, then the producer."""
    directory = tmp_path_factory.mktemp("shop")
    environ = user_environ(stack)
    lines = [line.partition("#")[0].strip() for line in blocks("plain_celery_app", "sh")[0].splitlines()]
    setup = [line for line in lines if line.startswith(("cd ", "export "))]
    provision, create_queue, orders, reports, beat, producer = (line for line in lines if line and line not in setup)

    def after_setup(command: str) -> str:
        return "\n".join([*setup, command])

    for command in (provision, create_queue, create_queue):  # the second step says that it is safe to repeat
        run(after_setup(command), environ)
    processes = {
        "orders": f"PYTHONPATH={ROOT} exec {orders} -c 1 -I tests.acceptance.loaded_modules",
        "reports": f"exec {reports} -c 1",
        "beat": f"exec {beat} --schedule {directory}/schedule --pidfile {directory}/beat.pid",
    }
    with ExitStack() as started:
        for name, command in processes.items():
            started.enter_context(running(after_setup(command), environ, directory / f"{name}.log"))
        yield Shop(
            printed=run(after_setup(producer), environ),
            orders_log=directory / "orders.log",
            reports_log=directory / "reports.log",
            sender=create_app(load_settings({**environ, "MDSTORE_NAMESPACE": "shop"}).settings),
        )


def test_the_producer_prints_what_its_readme_shows(shop: Shop) -> None:
    """The chain, the chord, the retried task and the second queue's task have the results that the README shows."""
    (promised,) = blocks("plain_celery_app", "text")
    assert shop.printed == promised.replace("HOST", socket.gethostname())


def test_a_retried_task_backs_off(shop: Shop) -> None:
    """The first two tries fail and are retried after 1 s and 2 s, and the third try succeeds."""
    log = until(lambda: _containing(shop.orders_log, r"tasks\.notify\[[^]]+\] succeeded"))
    assert re.findall(r"tasks\.notify\[[^]]+\] retry: Retry in (\d+)s", log) == ["1", "2"]


def test_each_worker_executes_the_tasks_of_its_own_queue(shop: Shop) -> None:
    """Reports run on the worker of the reports' queue; all other tasks, beat's included, run on the other worker."""
    tasks = {"price", "total", "add_shipping", "invoice", "notify", "refresh_rates"}
    # A worker logs a success after it has stored the result, so the producer may be done before that.
    until(lambda: _succeeded(shop.reports_log) and _succeeded(shop.orders_log) >= tasks)
    assert _succeeded(shop.reports_log) == {"report"}
    assert _succeeded(shop.orders_log) - {"loaded_modules"} == tasks


def test_beat_sends_its_task_repeatedly(shop: Shop) -> None:
    """A worker runs the scheduled task at least twice."""
    until(lambda: len(re.findall("exchange rates are fresh", shop.orders_log.read_text())) >= 2)


def test_the_second_queue_has_the_attributes_of_the_first(shop: Shop) -> None:
    """The example's deployment step gives its queue the same times and redrive policy that `mdstore provision` gives."""
    first = shop.attributes("shop")
    assert len(first) == 3
    assert first["RedrivePolicy"]["deadLetterTargetArn"].endswith(":shop-dead-letters")
    assert shop.attributes("shop-reports") == first


def test_a_plain_app_has_nothing_of_the_data_store(shop: Shop) -> None:
    """Its worker imports no module of the store, and its namespace has neither a records nor a ledger table."""
    loaded = shop.sender.send_task("tests.loaded_modules").get(timeout=60)
    assert "mdstore.queue.app" in loaded
    rooms = {name.split(".")[1] for name in loaded if "." in name}
    assert rooms & {"store", "tasks", "client", "api", "files", "cli", "local", "provision"} == set()

    pages = shop.sender.aws.dynamodb.get_paginator("list_tables").paginate()
    tables = {name for page in pages for name in page["TableNames"] if name.startswith("shop-")}
    assert tables == {"shop-results", "shop-due"}


def _containing(log: Path, pattern: str) -> str:
    """Return the log if it contains `pattern`, else an empty text."""
    text = log.read_text()
    return text if re.search(pattern, text) else ""


def _succeeded(log: Path) -> set[str]:
    """Return the short names of the tasks that succeeded, from a worker's log."""
    return set(re.findall(r"Task [\w.]*\.(\w+)\[[^]]+\] succeeded", log.read_text()))


# -- the FastAPI producer


@dataclass(frozen=True)
class Service:
    """The running example: its address, and the environment of its users, hidden from the output of failed tests."""

    url: str
    environ: dict[str, str] = field(repr=False)

    def post(self, key: str, *prices: dict[str, Any]) -> httpx.Response:
        """Post a price list."""
        headers = {"Idempotency-Key": key}
        return httpx.post(f"{self.url}/price-lists", json={"prices": prices}, headers=headers, timeout=60)

    def completed(self, status_url: str) -> dict[str, Any]:
        """Wait until a price list is completed; returns its status."""

        def status() -> dict[str, Any]:
            found: dict[str, Any] = httpx.get(status_url).raise_for_status().json()
            return found if found["state"] == "completed" else {}

        return until(status)


@contextmanager
def served(environ: dict[str, str], log: Path) -> Iterator[Service]:
    """Serve the example by its README's command on a free port; yields once it answers."""
    port = free_port()
    command = blocks("fastapi_producer", "sh")[0].strip().replace("8000", str(port))
    service = Service(f"http://127.0.0.1:{port}", environ)
    with running(f"exec {command}", environ, log) as process:
        until(lambda: process.poll() is not None or _answers(service))
        assert process.poll() is None, log.read_text()
        yield service


def _answers(service: Service) -> bool:
    try:
        return httpx.get(f"{service.url}/openapi.json").is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def service(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Yield the example over the shared stack, whose worker applies what the example accepts."""
    with served(user_environ(stack), tmp_path_factory.mktemp("service") / "uvicorn.log") as running_service:
        yield running_service


def test_the_readmes_curl_lines_post_a_price_list_and_see_it_applied(service: Service) -> None:
    """A price list posted with curl is answered with 202, completes, and its prices are stored."""
    post, get, read = blocks("fastapi_producer", "sh")[1].replace("http://127.0.0.1:8000", service.url).splitlines()

    assert "HTTP/1.1 202 " in run(BASH_FUNCTION + post, service.environ)
    service.completed(f"{service.url}/price-lists/price-service:monday")
    status = json.loads(run(BASH_FUNCTION + get, service.environ))
    assert (status["state"], status["applied"], status["refused"], status["failed"]) == ("completed", 2, 0, 0)
    assert "420" in run(read, service.environ)


def test_a_key_is_bound_to_one_content(service: Service) -> None:
    """The same key and content get the same answer and change nothing; with other content the answer is 409."""
    first = service.post("key-1", {"article": "one", "cents": 100})
    assert first.status_code == 202
    assert first.headers["Location"] == first.json()["status_url"]
    done = service.completed(first.json()["status_url"])
    assert (done["applied"], done["error"]) == (1, "")

    again = service.post("key-1", {"article": "one", "cents": 100})
    assert (again.status_code, again.json()) == (202, first.json())
    assert service.completed(again.json()["status_url"]) == done
    record = json.loads(run("mdstore get price one --json", service.environ))
    assert (record["version"], record["data"]) == (1, {"cents": 100})

    other = service.post("key-1", {"article": "one", "cents": 101})
    assert other.status_code == 409
    assert "price-service:key-1" in other.json()["detail"]


def test_a_bad_operation_is_named_and_nothing_is_stored(service: Service) -> None:
    """The answer is 422 with index, field and reason, and the request does not exist."""
    answer = service.post("bad-1", {"article": "good", "cents": 1}, {"article": "", "cents": 1})
    assert answer.status_code == 422
    assert answer.json()["detail"] == [{"index": 1, "field": "key", "reason": "must have 1-1024 bytes as UTF-8, has 0"}]
    assert httpx.get(f"{service.url}/price-lists/price-service:bad-1").status_code == 404

    answer = service.post("a bad key", {"article": "good", "cents": 1})
    assert (answer.status_code, answer.json()["detail"][0]["field"]) == (422, "request_id")


def test_while_aws_is_silent_the_service_answers_others_and_then_answers_503(stack: Stack, tmp_path: Path) -> None:
    """A submit that waits for AWS does not block the event loop; once AWS is gone, the answer asks to send the same again."""
    with socket.create_server(("127.0.0.1", 0)) as silent_aws, ExitStack() as started:
        silent_aws.settimeout(60)
        environ = user_environ(stack, AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent_aws.getsockname()[1]}")
        service = started.enter_context(served(environ, tmp_path / "uvicorn.log"))
        pool = started.enter_context(ThreadPoolExecutor(1))
        posted = pool.submit(service.post, "silent-1", {"article": "one", "cents": 1})
        connection, _ = silent_aws.accept()  # the call to S3 has arrived, and will not be answered
        with connection:
            assert _answers(service)
            assert not posted.done()
        silent_aws.close()
        answer = posted.result(60)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
