"""With a real worker, a source with long lanes does not hold up another one."""

from __future__ import annotations

import re
from pathlib import Path

from mdstore.local.emulator import EmbeddedAws
from mdstore.model import Counts, State
from tests.integration.fair_lanes import OPERATIONS, REQUESTS, client_and_worker, small_request_behind


def test_a_request_does_not_wait_for_another_source_s_history_of_one_key(aws: EmbeddedAws, tmp_path: Path) -> None:
    """360,000 upserts of one key are in front of one operation. All are applied, each once.

    It takes half a second on an idle machine; other tests share this one.
    """
    with client_and_worker(aws, tmp_path / "worker.log") as client:
        assert small_request_behind(client, "upsert") < 15
        for number in range(REQUESTS):
            client.wait(f"busy{number}", timeout=120)
            assert client.status(f"busy{number}").counts == Counts(applied={"upsert": OPERATIONS})
        record = client.get("thing", "hot")
        assert (record.version, record.data) == (REQUESTS * OPERATIONS, {"n": OPERATIONS - 1})
        assert client.verify(record.updated_by.partition("/")[0]).faults == []


def test_a_request_does_not_wait_for_lanes_that_cannot_be_folded(aws: EmbeddedAws, tmp_path: Path) -> None:
    """Patches of one key take minutes, in turns; a request that comes after them is completed before any of theirs is."""
    log = tmp_path / "worker.log"
    with client_and_worker(aws, log) as client:
        seconds = small_request_behind(client, "patch", count=5_000)
        assert all(client.status(f"busy{number}").state is State.ACCEPTED for number in range(REQUESTS))
        assert seconds < 30
    turns = re.findall(r"lane\.continued .*'lane 0: (\d+) of 5000 waves are applied'", log.read_text())
    assert turns
    assert all(0 < int(turn) < 5_000 for turn in turns)


def test_a_lane_in_turns_is_completed(aws: EmbeddedAws, tmp_path: Path) -> None:
    """300 patches of one key, ten to a turn, are all applied in their order; the caller gets the result of the last turn."""
    log = tmp_path / "worker.log"
    operations = [
        {"op": "upsert" if n == 0 else "patch", "entity": "thing", "key": "k", "data": {"n": n, f"m{n}": 1}}
        for n in range(300)
    ]
    with client_and_worker(aws, log, MDSTORE_LANE_TURN_WAVES="10") as client:
        assert client.ingest.delay(operations, request_id="r").get(timeout=120)["applied"] == 300
        record = client.get("thing", "k")
        assert record.version == 300
        assert record.data == {"n": 299, **{f"m{n}": 1 for n in range(300)}}
        assert client.verify("r").faults == []
    assert len(re.findall(r"lane\.continued ", log.read_text())) >= 29
