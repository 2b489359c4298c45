"""The option `newest_wins` is taken in all ways in: Python, Celery, the command line and HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mdstore import exactjson
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from tests.integration.test_api import Deployment, bearer, deployment_at, served

INSERT: dict[str, Any] = {"op": "insert", "entity": "item", "key": "k", "data": {"n": 1}, "sequence": 5}


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A provisioned deployment without a worker."""
    with EmbeddedAws(port=free_port()) as aws:
        made = deployment_at(aws.url)
        list(provision(made.settings))
        yield made


def sent_ops(deployment: Deployment, request_id: str) -> list[str]:
    """Return the ops in the payload of a request."""
    payloads = deployment.client.store.payloads
    reference, _ = payloads.find(request_id)
    return [item.op for item in payloads.lane(reference, 0)]


def test_python_and_celery_take_it(deployment: Deployment) -> None:
    """`submit` and `ingest.delay` have an argument for it."""
    client = deployment.client
    client.submit([INSERT], request_id="submitted", newest_wins=True)
    client.ingest.delay([INSERT], request_id="delayed", newest_wins=True)
    client.submit([INSERT], request_id="without")
    assert [sent_ops(deployment, name) for name in ("submitted", "delayed", "without")] == [
        ["upsert"],
        ["upsert"],
        ["insert"],
    ]


def test_the_command_line_takes_it(deployment: Deployment, tmp_path: Path) -> None:
    """`mdstore load --newest-wins` sends the rows of a file that way."""
    file = tmp_path / "changes.jsonl"
    file.write_bytes(exactjson.dumps(INSERT) + b"\n")
    command = [
        sys.executable,
        "-m",
        "mdstore",
        "load",
        str(file),
        "--request-id",
        "loaded",
        "--newest-wins",
        "--no-wait",
    ]
    subprocess.run(command, env=dict(deployment.environ), check=True, timeout=60)
    assert sent_ops(deployment, "loaded") == ["upsert"]


def test_the_http_api_takes_it_and_says_what_it_does_not_take(deployment: Deployment, tmp_path: Path) -> None:
    """`?newest_wins=true` sends the operations that way; an operation without a sequence is an error with its field."""
    with served(deployment, tmp_path / "log") as door:
        headers = {**bearer(deployment.key("write")), "Idempotency-Key": uuid4().hex}
        body = {"operations": [INSERT]}
        answer = door.post("/v1/requests?newest_wins=true", json=body, headers=headers)
        assert answer.status_code == 202
        assert sent_ops(deployment, answer.json()["request_id"]) == ["upsert"]
        flawed = {"operations": [{name: value for name, value in INSERT.items() if name != "sequence"}]}
        refused = door.post("/v1/requests?newest_wins=true", json=flawed, headers=headers)
    assert refused.status_code == 422
    assert [(error["index"], error["field"]) for error in refused.json()["errors"]] == [(0, "sequence")]
