"""Two workers with the same lane at the same time, as after an expired visibility timeout, apply it exactly once."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from mdstore.aws.concurrent import Task
from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.model import Counts, Operation, Reference
from mdstore.provision import provision
from mdstore.settings import load_settings
from mdstore.store import Store
from mdstore.store.ledger_items import Receipt
from mdstore.store.writer import Writer
from tests.chaos.expected import Expected, families, random_operations
from tests.chaos.messages import Messages
from tests.chaos.worker_pool import worker_pool
from tests.waiting import until

ROUNDS = 15
OPERATIONS = 600  # a round
PATCHES = 25  # per record and writer
LANES = 2  # so that a wave has several transactions
VISIBLE_AGAIN = 2  # seconds
Environ = dict[str, str]


@pytest.fixture(scope="module")
def environ() -> Iterator[Environ]:
    """Yield the environment of a provisioned emulator."""
    with EmbeddedAws(port=free_port()) as aws:
        made = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": f"two-{uuid4().hex[:12]}",
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_LANE_OPERATIONS": str(OPERATIONS // LANES),
            "MDSTORE_LANE_TURN": "1000",
            "MDSTORE_LANE_TURN_WAVES": "1000000",
        }
        for _ in provision(load_settings(made).settings):
            pass
        yield made


# -- two writers


def _apply_at_once(environ: Mapping[str, str], barrier: Barrier, orders: Connection) -> None:
    """Apply the lanes of each order when the other process is ready too; answer with the counts and the overlaps so far."""
    store = Store(load_settings(environ).settings)
    overlaps: list[Receipt] = []  # receipts of the other writer that this one met
    load = Writer._load_earlier_receipts

    def loaded(self: Writer, run: Any, existing: Receipt) -> Task[Receipt]:
        overlaps.append(existing)
        return load(self, run, existing)

    Writer._load_earlier_receipts = loaded  # type: ignore[method-assign]
    with suppress(EOFError):  # raised when the orders end
        while True:
            reference, lanes = orders.recv()
            store.payloads.header(reference)
            barrier.wait(60)
            orders.send(({lane: store.writer.apply_lane(reference, lane).counts for lane in lanes}, len(overlaps)))


@contextmanager
def _two_writers(environ: Mapping[str, str]) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=_apply_at_once, args=(environ, barrier, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    try:
        yield [ours for ours, _ in pipes]
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in processes:
            process.join(20)
            process.kill()


def _stored(client: Client, operations: Sequence[Operation], request_id: str) -> Reference:
    """Accept and start a request without sending its message; returns its reference."""
    store = client.store
    accepted = store.ingestor.accept(operations, publish=lambda _: None, request_id=request_id, on_invalid="refuse")
    store.ledger.start(accepted.reference, operations=accepted.operations, refused=accepted.refused)
    return accepted.reference


def test_two_writers_with_the_same_lanes_apply_them_once(environ: Environ) -> None:
    """Both start together, with lanes in the same or opposite order; they count the same, and the store matches the model."""
    seed = random.randrange(2**32)
    print(f"random seed {seed}")
    dice = random.Random(seed)
    client = Client(load_settings(environ).settings)
    overlaps = [0, 0]
    with _two_writers(environ) as writers:
        for number in range(ROUNDS):
            request_id = f"round{number}"
            expected = Expected(random_operations(dice, f"e{number}", OPERATIONS))
            reference = _stored(client, expected.operations, request_id)
            lanes = list(range(reference.lanes))
            writers[0].send((reference, lanes))
            writers[1].send((reference, lanes if number % 2 else lanes[::-1]))
            answers: list[tuple[dict[int, Counts], int]] = [_received(writer) for writer in writers]
            assert answers[0][0] == answers[1][0]
            assert client.store.ledger.finish(request_id).counts.total == OPERATIONS
            expected.check(client, request_id)
            overlaps = [count for _, count in answers]
    assert min(overlaps) > ROUNDS // 4, "the two hardly overlapped"


def test_two_requests_that_patch_the_same_records_lose_no_patch(environ: Environ) -> None:
    """Two writers patch the same records, each patch with a field of its own; in the end every record has all fields."""
    client = Client(load_settings(environ).settings)
    keys = [f"k{number}" for number in range(4)]
    made = [Operation(op="insert", entity="patched", key=key, data={}) for key in keys]
    client.store.writer.apply_request(_stored(client, made, "made"))
    patches = [
        [
            Operation(op="patch", entity="patched", key=key, data={f"{writer}-{n}": n})
            for n in range(PATCHES)
            for key in keys
        ]
        for writer in range(2)
    ]
    references = [_stored(client, operations, f"patches{number}") for number, operations in enumerate(patches)]
    with _two_writers(environ) as writers:
        for writer, reference in zip(writers, references, strict=True):
            writer.send((reference, range(reference.lanes)))
        for writer in writers:
            counts, _ = _received(writer)
            assert sum((found.applied["patch"] for found in counts.values()), start=0) == PATCHES * len(keys)
    names = {f"{writer}-{n}": n for n in range(PATCHES) for writer in range(2)}
    for key in keys:
        record = client.get("patched", key)
        assert (record.version, record.data) == (1 + len(names), names)


def _received(writer: Connection) -> Any:
    assert writer.poll(100), "no answer"
    return writer.recv()


# -- two workers


def test_a_lane_that_outlives_its_visibility_timeout_is_applied_once(environ: Environ, tmp_path: Path) -> None:
    """Both workers reach the middle of every lane, the second by redelivery, and then continue; each lane completes once."""
    expected = Expected(families("slow", 11))
    environ = {
        **environ,
        "MDSTORE_QUEUE": "slow",
        "MDSTORE_VISIBILITY_TIMEOUT": str(VISIBLE_AGAIN),
        "MDSTORE_DEAD_LETTER_QUEUE": "slow-dead",
        "MDSTORE_LANE_OPERATIONS": str(len(expected.operations) // 3 + 1),
    }
    client = Client(load_settings(environ).settings)
    messages = Messages(client.store.aws.sqs, client.settings)
    client.submit(expected.operations, request_id="slow")
    lanes = range(client.status("slow").lanes)
    assert len(lanes) > 1
    with worker_pool() as workers:
        logs = [tmp_path / "first.log", tmp_path / "second.log"]
        for log in logs:
            at_barrier = {**environ, "BARRIER": str(tmp_path), "BARRIER_WORKER": log.stem}
            workers.start("tests.chaos.barrier", at_barrier, log, processes=len(lanes))
            # Each process of the first worker has a lane, so only the second receives the messages that reappear.
            reached = partial(_is_in_every_lane, tmp_path, log.stem, len(lanes))
            until(reached, within=100, what=f"the {log.stem} worker is in every lane")
        client.wait("slow", timeout=60)
        messages.wait_until_acknowledged()
    expected.check(client, "slow")
    events = "".join(log.read_text() for log in logs)
    assert sorted(re.findall(r"lane\.completed request_id=slow lane=(\d+) ", events)) == [str(lane) for lane in lanes]
    assert len(re.findall(r"request\.completed request_id=slow ", events)) == 1
    first, second = (set(re.findall(r"Task mdstore\.apply_lane\[([^\]]+)\] received", log.read_text())) for log in logs)
    assert len(first) == len(lanes)
    assert second == first, "the second worker did not get the same messages"


def _is_in_every_lane(directory: Path, worker: str, lanes: int) -> bool:
    return all((directory / f"{lane}.{worker}").exists() for lane in range(lanes))
