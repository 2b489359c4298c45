"""A worker is killed between the turns of a lane: before and after each step from one turn's end to the next one's waves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from tests.chaos.test_kills import AT_ONCE, Case, Environment
from tests.chaos.worker_pool import worker_pool

#: Each lane has three waves and more, and a turn is one wave. Of a small request, only what is left of it is published here.
STEPS = ["turn", "publish:ingest", "find", "send", "complete"]
KILLS = [
    *((f"{step} {moment} 1",) for step in STEPS for moment in ("before", "after")),
    *(
        (f"{step} after 1",) * 2 for step in ("turn", "publish:ingest", "find")
    ),  # in two turns, or in one after the other
    # Several deaths: a message and its successor are both delivered again.
    ("publish:ingest after 1", "find after 1", "send after 1", "complete before 1"),
]
CASES = [
    *(Case(kills, group, small=True) for kills in KILLS for group in (True, False)),
    *(
        Case((f"ack:ingest {moment} {nth}",), group=True, small=True)
        for moment in ("before", "after")
        for nth in (1, 2)
    ),
    # Lanes that are parts of a chord.
    *(Case((f"{step} after 2",), group) for step in ("turn", "find", "send", "close") for group in (True, False)),
    Case(("ack:apply_lane before 1", "ack:apply_lane after 2"), group=True),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, Future[None]]]:
    with EmbeddedAws(port=free_port()) as aws, worker_pool() as workers, ThreadPoolExecutor(AT_ONCE) as pool:
        environment = Environment(aws, workers, tmp_path_factory.mktemp("turns"), MDSTORE_LANE_TURN_WAVES="1")
        yield {case: pool.submit(environment.run, f"turns{number}", case) for number, case in enumerate(CASES)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_worker_that_dies_between_turns_loses_and_doubles_nothing(case: Case, runs: dict[Case, Future[None]]) -> None:
    """The lane ends with every operation applied once, whether its message, its successor, both or neither was left."""
    runs[case].result(timeout=280)
