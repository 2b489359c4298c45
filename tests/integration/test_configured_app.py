"""Apps as Celery users write them: provisioned, run and sent to from outside, over the embedded AWS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mdstore.aws.clients import AwsClients
from mdstore.local.emulator import EmbeddedAws
from mdstore.settings import load_settings
from tests.integration.test_queue import ROOT, Environ, namespace, worker
from tests.waiting import until

APP = "tests.integration.configured_app"


@pytest.fixture
def environ(aws: EmbeddedAws) -> Environ:
    return namespace(aws, with_store=False)


def run(environ: Environ, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def provisioned(environ: Environ, *options: str) -> set[tuple[str, str]]:
    """Run `mdstore provision`; return kind and name of what it looked after."""
    done = run(environ, "-m", "mdstore", "provision", "--json", *options)
    assert done.returncode == 0, done.stderr
    return {(row["kind"], row["name"]) for row in json.loads(done.stdout)}


PRODUCER = """
import threading
from celery import signature
from celery.result import AsyncResult
import tests.integration.configured_app as made
results = [made.quick.delay(1), signature("slow").delay()]
thread = threading.Thread(target=lambda: results.append(made.quick.delay(2)))
thread.start(); thread.join()
print([AsyncResult(result.id).get(timeout=60) for result in results])
"""


def test_a_configured_app_runs_in_a_spawning_worker_of_two_queues(environ: Environ, tmp_path: Path) -> None:
    """Its producer knows nothing but the app's module, and sends from threads too."""
    namespace = environ["MDSTORE_NAMESPACE"]
    names = provisioned(environ, "--app", APP, "--queue", "reports", "--queue", "orders.fifo")
    assert {("queue", name) for name in (namespace, "emails", "reports", "orders.fifo")} <= names
    assert {name for kind, name in names if kind == "table"} == {f"{namespace}-results", f"{namespace}-due"}

    sqs = AwsClients(load_settings(environ).settings).sqs
    for queue, letters in (
        ("emails", "dead-letters"),
        ("reports", "dead-letters"),
        ("orders.fifo", "dead-letters.fifo"),
    ):
        url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
        attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        redrive = json.loads(attributes["RedrivePolicy"])
        assert redrive["deadLetterTargetArn"].endswith(f":{namespace}-{letters}")
        assert (int(redrive["maxReceiveCount"]), attributes["VisibilityTimeout"]) == (3, "12")

    log = tmp_path / "worker.log"
    with worker(environ, log, APP), worker(environ, tmp_path / "reports.log", APP, "-Q", "reports"):
        done = run(environ, "-c", PRODUCER)
    assert done.stdout == "[2, 'reports', 3]\n", done.stderr + log.read_text()
    said = log.read_text()
    url = environ["AWS_ENDPOINT_URL"]
    for line in (
        f"transport:   sqs://us-east-1 ({url})",
        f"results:     dynamodb://us-east-1/{namespace}-results ({url})",
        ".> emails",
    ):
        assert line in said


def test_a_worker_without_its_queue_says_which_command_makes_it(environ: Environ, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with worker(environ, log, APP, "-Q", "nobodys") as process:
        until(lambda: process.poll() is not None)
    assert "there is no queue 'nobodys'" in log.read_text()
    assert "mdstore provision --queue nobodys" in log.read_text()


def test_what_is_no_app_of_this_package_is_refused(environ: Environ) -> None:
    for path, said in (("nowhere.app", "cannot be imported"), ("tests.integration.test_queue", "cannot be imported")):
        done = run(environ, "-m", "mdstore", "provision", "--app", path)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    done = run(environ, "-m", "mdstore", "provision", "--queue", "a queue")
    assert (done.returncode, "letters, digits" in done.stderr.replace("\n", " ")) == (1, True), done.stderr
