"""`docs/write-path.md` is true: a request passes through the functions in the page's order, until its message is deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.local.stack import stop_process
from mdstore.model import State
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.waiting import until
from tests.write_path import ROOT, first_calls, hops, recorded


@contextmanager
def recording_worker(environ: dict[str, str], log: Path) -> Iterator[None]:
    """Run a worker with one pool process that records its calls."""
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.recorded_app", "worker", "-c", "1"]
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True)
    try:
        yield
    finally:
        stop_process(process)


@pytest.mark.parametrize(
    ("heading", "count", "patches", "requests"),
    [
        ("A request of one lane", 1, 0, 1),
        ("Small requests side by side", 1, 0, 20),
        ("A request of several lanes", 250, 0, 1),
        ("A lane of many waves", 1, 2, 1),
    ],
    ids=["one", "side by side", "several", "many waves"],
)
def test_a_request_calls_the_functions_in_the_order_of_the_page(
    aws: EmbeddedAws, tmp_path: Path, heading: str, count: int, patches: int, requests: int
) -> None:
    """Producer and worker call every listed function, and their first calls are in the order of the rows."""
    listed, calls = hops(heading), tmp_path / "calls"
    environ = {
        **os.environ,
        "AWS_ENDPOINT_URL": aws.url,
        "MDSTORE_NAMESPACE": f"page-{uuid4().hex[:12]}",
        "MDSTORE_LANE_OPERATIONS": "100",
        "MDSTORE_LANE_TURN_WAVES": "1",
        "CALLS": str(calls),
        "CALLS_OF": json.dumps(listed),
    }
    settings = load_settings(environ).settings
    for _ in provision(settings):
        pass
    client = Client(settings)
    _ = client.ingest  # the app is made before the request
    operations = [{"op": "upsert", "entity": "thing", "key": f"k{n}", "data": {"n": n}} for n in range(count)]
    operations += [{"op": "patch", "entity": "thing", "key": "k0", "data": {"n": n}} for n in range(patches)]

    with recorded(calls, listed):
        for number in range(requests):
            submission = client.submit(operations, request_id=f"r{number}")
    with recording_worker(environ, tmp_path / "worker.log"):
        assert submission.wait(60).status().state is State.COMPLETED
        until(lambda: listed[-1] in first_calls(calls), what=f"{listed[-1]} is called")

    assert first_calls(calls) == listed
