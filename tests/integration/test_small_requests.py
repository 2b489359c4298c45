"""Small requests that share payloads and messages are requests like all others, from their submission to their outcomes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mdstore.client import Client, Submission
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import Counts, State
from tests.integration.fair_lanes import client_and_worker

ROOT = Path(__file__).parents[2]
_THREADS = 32


@pytest.fixture(scope="module")
def client(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a namespace in which a worker runs."""
    with client_and_worker(aws, tmp_path_factory.mktemp("worker") / "log") as made:
        yield made


def mdstore(client: Client, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in the client's namespace."""
    settings = client.settings
    environ = {**os.environ, "AWS_ENDPOINT_URL": str(settings.endpoint_url), "MDSTORE_NAMESPACE": settings.namespace}
    command = [sys.executable, "-m", "mdstore", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=environ, capture_output=True)


def submit_all(client: Client, requests: dict[str, list[dict[str, Any]]], **options: Any) -> list[Submission]:
    """Submit requests from many threads, and wait until all are completed."""
    with ThreadPoolExecutor(_THREADS) as threads:
        submitted = threads.map(lambda pair: client.submit(pair[1], request_id=pair[0], **options), requests.items())
        return [one.wait(60) for one in submitted]


def test_requests_of_many_threads_share_payloads_and_have_their_own_outcomes(client: Client) -> None:
    """Each has its own state, counts and outcomes; `status` and `verify` know it as they know a large one."""
    requests = {
        f"many/{number}": [
            {"op": "upsert", "entity": "many", "key": f"k{number}", "data": {"n": number}},
            {"op": "update", "entity": "many", "key": f"missing{number}", "data": {"n": number}},
        ]
        for number in range(200)
    }
    before = len(payloads(client))
    submitted = submit_all(client, requests)
    assert len(payloads(client)) - before < len(requests) / 2

    for one in submitted:
        status = one.status()
        assert (status.state, status.operations) == (State.COMPLETED, 2)
        assert status.counts == Counts(applied={"upsert": 1}, refused={"missing": 1})
        assert [(outcome.index, outcome.outcome) for outcome in one.outcomes()] == [(0, "applied"), (1, "refused")]
        assert client.verify(one.request_id).ok
    record = client.get("many", "k7")
    assert (record.data, record.version) == ({"n": 7}, 1)
    assert record.updated_by.startswith("many/7/")

    batched = next(one for one in submitted if one.status().is_batched)
    shown = mdstore(client, "status", batched.request_id, "--outcomes", "refused", "--json")
    assert shown.returncode == 0, shown.stderr
    assert b'"missing"' in shown.stdout
    verified = mdstore(client, "verify", batched.request_id, "--json")
    assert verified.returncode == 0, verified.stderr
    assert msgspec.json.decode(verified.stdout)["operations"] == 2


def payloads(client: Client) -> list[str]:
    """Return the keys of all payloads."""
    pages = client.store.aws.s3.get_paginator("list_objects_v2").paginate(
        Bucket=client.settings.bucket, Prefix=client.settings.payload_prefix
    )
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


def test_small_files_that_are_loaded_together_are_requests_of_their_own(client: Client, tmp_path: Path) -> None:
    """`mdstore load` of a small file waits for it and counts it, whoever else submits meanwhile."""
    path = tmp_path / "small.jsonl"
    path.write_text(
        '{"op":"insert","entity":"file","key":"a","data":{"n":1}}\n{"op":"delete","entity":"file","key":"b"}\n'
    )
    others = {f"other/{n}": [{"op": "upsert", "entity": "file", "key": f"o{n}", "data": {}}] for n in range(50)}
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(mdstore, client, "load", str(path), "--request-id", "file/1", "--json")
        submit_all(client, others)
        assert loading.result().returncode == 3, loading.result().stderr
    assert client.status("file/1").counts == Counts(applied={"insert": 1}, refused={"missing": 1})


def test_a_history_with_sequences_ends_in_its_last_state(client: Client) -> None:
    """Each change of a key is a request of its own, sent when the one before was accepted; the highest sequence wins."""
    chosen = random.Random(5)
    keys = [f"brand{number}" for number in range(_THREADS)]
    last: dict[str, dict[str, Any] | None] = {}

    def change(key: str) -> list[str]:
        ids = []
        for sequence in range(20):
            gone = chosen.random() < 0.2
            operation: dict[str, Any] = {
                "op": "delete" if gone else "upsert",
                "entity": "brand",
                "key": key,
                "sequence": sequence,
            }
            last[key] = None if gone else {"n": sequence}
            if not gone:
                operation["data"] = last[key]
            ids.append(client.submit([operation], newest_wins=True).request_id)
        return ids

    with ThreadPoolExecutor(_THREADS) as threads:
        for ids in threads.map(change, keys):
            for request_id in ids:
                client.wait(request_id)
    found = client.store.records.look_up(("brand", key) for key in keys)
    assert {key: found["brand", key].data for key in keys} == last
