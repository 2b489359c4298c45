"""A change history with sequences, applied in a shuffled order, and compared with the highest sequence of each key.

python -m tests.integration.shuffled_history [SEEDS]      8,000 operations, 16 requests and 8 threads for each seed
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from uuid import uuid4

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.model import Operation, OpName, Reference, State
from mdstore.provision import provision
from mdstore.settings import load_settings
from mdstore.store import Store

Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done at once. One of four operations is a delete."""

    operations: int = 8_000
    keys: int = 1_000
    requests: int = 16
    threads: int = 8


def history(size: Size, dice: random.Random, entity: str, ops: Sequence[OpName]) -> list[Operation]:
    """Changes in the order in which a source made them; the sequence is their place."""
    found = []
    for sequence in range(size.operations):
        op: OpName = "delete" if dice.random() < 0.25 else dice.choice(ops)
        key = f"k{dice.randrange(size.keys)}"
        data = None if op == "delete" else {"n": sequence}
        found.append(Operation(op=op, entity=entity, key=key, data=data, sequence=sequence))
    return found


def run(store: Store, seed: int, size: Size, *, newest_wins: bool = False) -> list[str]:
    """Apply a shuffled history; return the keys that do not end in the state of their highest sequence."""
    dice, entity = random.Random(seed), f"e{uuid4().hex[:8]}"
    ops: list[OpName] = ["insert", "update", "upsert"] if newest_wins else ["upsert"]
    changes = history(size, dice, entity, ops)
    shuffled = dice.sample(changes, len(changes))

    def submit(number: int) -> None:
        part = shuffled[number :: size.requests]
        accepted = store.ingestor.accept(
            part, publish=lambda reference: _apply(store, reference), newest_wins=newest_wins
        )
        assert store.verifier.verify(store.ledger.get(accepted.reference.request_id)).faults == []

    with ThreadPoolExecutor(size.threads) as pool:
        list(pool.map(submit, range(size.requests)))
    expected = {(entity, change.key): change for change in changes}  # the last one of each key
    records = store.records.look_up(expected)
    found = {key: (one.data, one.sequence, one.deleted) for key, one in records.items()}
    return [
        f"{key}: {found.get(key)}, expected {last}"
        for key, last in expected.items()
        if found.get(key) != (last.data, last.sequence, last.op == "delete")
    ]


def _apply(store: Store, reference: Reference) -> bool:
    """Apply a request as the tasks do, on the calling thread."""
    if reference.lanes <= 1:
        return store.writer.apply_request(reference).state is State.COMPLETED
    header = store.payloads.header(reference)
    store.ledger.start(reference, operations=header.operations, refused=header.refused_counts)
    for lane in range(reference.lanes):
        store.writer.apply_lane(reference, lane)
    return store.ledger.finish(reference.request_id).state is State.COMPLETED


def store_on(aws: EmbeddedAws) -> Store:
    """Make a store with tables of its own."""
    environ = {
        "AWS_ENDPOINT_URL": aws.url,
        "MDSTORE_NAMESPACE": f"history-{uuid4().hex[:8]}",
        "MDSTORE_LANE_OPERATIONS": "100",
        "MDSTORE_LANE_TURN": "1000",
        "MDSTORE_LANE_TURN_WAVES": "1000000",
    }
    settings = load_settings(environ).settings
    list(provision(settings))
    return Store(settings)


def main(seeds: int) -> int:
    """Run the whole history with each seed, as upserts and deletes and with `newest_wins`. Return the number of wrong keys."""
    wrong = 0
    with EmbeddedAws(port=free_port()) as aws:
        store = store_on(aws)
        for seed in range(seeds):
            for newest_wins in (False, True):
                start = time.monotonic()
                faults = run(store, seed, Size(), newest_wins=newest_wins)
                wrong += len(faults)
                print(
                    f"seed {seed}, newest_wins={newest_wins}: {len(faults)} wrong keys, {time.monotonic() - start:.0f} s",
                    *faults[:3],
                )
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if sys.argv[1:] else 10)))
