"""A request may have as many groups as operations: its time and memory stay proportional to its size."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import closing

from mdstore.settings import Settings
from mdstore.store.entities import Entities
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.validation import Validator

OPERATIONS = 40_000
LINE = b'{"op":"upsert","entity":"e","key":"k%d","data":{"n":1},"group":"%s%d"}'


def seconds_to_encode(*, groups: int) -> float:
    """Return the processor time of encoding `OPERATIONS` operations, in lanes of about 10, as `groups` groups."""
    settings = Settings(lane_operations=10)
    with closing(
        PayloadBuilder(validator=Validator(entities=Entities(), max_record_bytes=1_024), settings=settings)
    ) as builder:
        for number in range(OPERATIONS):
            assert builder.add(LINE % (number, b"g", number % groups)) is None
        start = time.process_time()
        assert not list(builder.refused_groups())
        builder.encode("r", "shop").body.close()
        return time.process_time() - start


def test_the_time_to_encode_does_not_depend_on_the_number_of_groups() -> None:
    """With 4,000 lanes and 40,000 groups, asking each group in each lane would take 160 million steps."""
    few = seconds_to_encode(groups=OPERATIONS // 10)
    assert seconds_to_encode(groups=OPERATIONS) < 5 * few + 3


def test_a_group_of_one_takes_little_memory() -> None:
    """What the builder remembers of a group is its name, the hash of its key, and their places in two dicts."""
    validator = Validator(entities=Entities(), max_record_bytes=1_024)
    with closing(PayloadBuilder(validator=validator, settings=Settings())) as builder:
        tracemalloc.start()
        try:
            for number in range(OPERATIONS):
                builder.add(LINE % (number, b"g", number))
            used, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (
        used / OPERATIONS < 450
    )  # bytes, of which about 110 are the operation's own line, buffered until it exceeds 4 MB
