"""A worker that runs out of memory: what it was to do comes again, and is never taken for forged."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import zstandard

from mdstore.client import Client
from mdstore.compression import compress, decompress
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.model import State
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.waiting import until

_FINAL = (State.COMPLETED, State.FAILED)


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    with EmbeddedAws(port=free_port()) as aws:
        made = {
            "MDSTORE_NAMESPACE": f"memory-{uuid4().hex[:12]}",
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_LANE_OPERATIONS": "2",
            "STARVED": str(tmp_path / "starved"),
        }
        for _ in provision(load_settings(made).settings):
            pass
        yield made


@contextmanager
def worker(environ: dict[str, str], log: Path) -> Iterator[None]:
    """A worker with one process for tasks."""
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.starved_app", "worker", "-c", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=output, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("operations", [1, 8], ids=["one lane", "many lanes"])
def test_a_lane_that_did_not_fit_into_memory_comes_again(
    environ: dict[str, str], tmp_path: Path, operations: int
) -> None:
    """Nothing was wrong with it, so nothing is dead-lettered, and once there is memory the request completes."""
    client = Client(load_settings(environ).settings)
    Path(environ["STARVED"]).write_text("2")
    with worker(environ, tmp_path / "worker.log"):
        client.submit(
            [{"op": "insert", "entity": "e", "key": f"k{number}", "data": {}} for number in range(operations)],
            request_id="r1",
        )
        until(lambda: client.status("r1").state in _FINAL, within=60, what="the request ends")
    status = client.status("r1")
    assert (status.state, status.counts.applied, status.error) == (State.COMPLETED, {"insert": operations}, "")
    assert Path(environ["STARVED"]).read_text() == "0"
    settings = client.settings
    sqs = client.store.aws.queues
    assert sqs.receive(sqs.url(settings.dead_letter_queue), 10, wait=1, visibility=1) == []


_LITTLE_MEMORY = textwrap.dedent("""
    import resource, sys
    from mdstore.compression import decompress
    data = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_AS, (300 * 2**20,) * 2)
    try:
        decompress(data, 600 * 2**20)
    except Exception as error:
        print(type(error).__name__)
""")


def test_genuine_data_that_does_not_fit_is_no_forgery() -> None:
    """What the system has no memory for may be read elsewhere, or later."""
    data = compress(bytes(600 * 2**20))
    found = subprocess.run([sys.executable, "-c", _LITTLE_MEMORY], input=data, capture_output=True, check=True)
    assert found.stdout == b"MemoryError\n"


def test_a_frame_that_wants_much_memory_is_refused_before_it_gets_any() -> None:
    """A forged frame of a few bytes cannot make a worker allocate 128 MB."""
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    forging = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    data = forging.compress(b"x" * 1_000) + forging.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="too much memory"):
        decompress(data, 1_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10  # KB


@pytest.mark.parametrize("size", [0, 1, 2**20, 9 * 2**20])
def test_our_own_frames_stay_below_the_bound(size: int) -> None:
    """Whatever the size of the content, level 3 needs a window of at most 2 MB."""
    content = bytes(size)
    assert decompress(compress(content), size) == content
