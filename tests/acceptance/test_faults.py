"""Killing workers, or delivering messages twice, does not change the result."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdstore.client import Client
from mdstore.local.stack import Stack, kill_group, stop_process
from mdstore.model import FINAL_STATES
from tests.acceptance import airports
from tests.waiting import until

KILLS = 20


@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    """After SIGKILL of a worker and its children, 20 times in the middle of loads, the state is the published one."""
    environ = {
        "MDSTORE_VISIBILITY_TIMEOUT": "8",
        "MDSTORE_TASK_TIME_LIMIT": "7",
        "MDSTORE_LANE_BUDGET": "6",
        "MDSTORE_MAX_RECEIVES": "999",
        "MDSTORE_WAIT_TIME": "1",
        "MDSTORE_LANE_OPERATIONS": "200",  # so many lanes that one load outlives most of the kills
    }
    seed = random.randrange(2**32)
    print(f"random seed {seed}")
    dice = random.Random(seed)
    with Stack(log_dir=tmp_path, with_api=False, with_worker=False, environ=environ) as stack:
        client = Client(stack.settings)
        kills = rounds = 0
        while kills < KILLS:
            rounds += 1
            kills += _round(stack, client, f"airport{rounds}", dice, KILLS - kills)
        assert rounds >= 1


def _round(stack: Stack, client: Client, entity: str, dice: random.Random, most: int) -> int:
    """Load and change one copy of the airports while killing workers; returns the number of kills."""
    load = client.submit(airports.inserts(entity), request_id=f"{entity}/load")
    kills = 0
    while kills < most and load.status().state not in FINAL_STATES:
        worker = stack.start_worker()
        before = load.status().counts.total
        until(
            lambda before=before: load.status().counts.total > before or load.status().state in FINAL_STATES,  # type: ignore[misc]
            within=90,
            what="the restarted worker finishes a lane",
        )
        time.sleep(dice.uniform(0, 0.5))  # the random moment, in any step of some lane
        in_the_middle = load.status().state not in FINAL_STATES
        kill_group(worker)
        kills += in_the_middle
    worker = stack.start_worker()
    load.wait(timeout=240)
    change = client.submit(airports.changes(entity), request_id=f"{entity}/changes").wait(timeout=120)
    stop_process(worker)

    assert load.status().counts.applied == {"insert": airports.AIRPORTS}
    assert change.status().counts.applied == {"delete": 294, "insert": 166, "update": 262}
    assert client.verify(load.request_id).faults == []
    assert client.verify(change.request_id).faults == []
    records = list(client.export(entity))
    assert airports.digest_of(records) == airports.FINAL_SHA256
    changed = {operation["key"]: operation["op"] for operation in airports.changes(entity)}
    wrong = [r for r in records if r.version != (2 if changed.get(r.key) == "update" else 1)]
    assert wrong == []
    return kills


@pytest.mark.timeout(600)
def test_every_message_delivered_twice_changes_nothing(tmp_path: Path) -> None:
    """With each message sent twice by producer and workers, the state is the published one and nothing is counted twice."""
    environ = {"MDSTORE_WAIT_TIME": "1", "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    with Stack(log_dir=tmp_path, with_api=False, with_worker=False, environ=environ) as stack:
        with (tmp_path / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tests.acceptance.twice", "worker", "-l", "INFO", "-c", "2"],
                env=stack.environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            from tests.acceptance.twice import twice_app  # noqa: PLC0415  importing it makes an app with default settings

            client = Client(app=twice_app(stack.settings))
            load = client.submit(airports.inserts(), request_id="load").wait(timeout=400)
            change = client.submit(airports.changes(), request_id="changes").wait(timeout=120)

            assert load.status().counts.applied == {"insert": airports.AIRPORTS}
            assert change.status().counts.applied == {"delete": 294, "insert": 166, "update": 262}
            records = list(client.export("airport"))
            assert airports.digest_of(records) == airports.FINAL_SHA256
            assert {record.version for record in records} == {1, 2}
            assert client.verify("load").faults == []
            assert client.verify("changes").faults == []
        finally:
            stop_process(worker)
        received = (tmp_path / "worker.log").read_text().count("mdstore.apply_lane") // 2
        assert received >= 2 * load.status().lanes, "the messages were not delivered twice"
