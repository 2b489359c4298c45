"""A worker that waits after the first wave of a lane until another worker has come as far with the same lane.

Run `celery -A tests.chaos.barrier worker`; `BARRIER` names a directory that both workers use, `BARRIER_WORKER` this worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import mdstore.store.writer
from mdstore.model import Reference
from mdstore.queue.broker.poller import Poller
from mdstore.store.ledger import LaneSummary
from mdstore.store.operations import Indexed
from mdstore.store.packing import Transaction, pack
from mdstore.store.writer import Writer
from mdstore.tasks import create_store_app
from tests.waiting import until

_directory = Path(os.environ["BARRIER"])
_worker = os.environ["BARRIER_WORKER"]
_apply = Writer._apply
_current_lane: list[int] = []  # the lane that this pool process is applying


def _apply_current(self: Writer, reference: Reference, lane: int) -> LaneSummary:
    _current_lane[:] = [lane]
    return _apply(self, reference, lane)


def _pack_with_barrier(operations: Sequence[Indexed]) -> Iterator[list[Transaction]]:
    for number, wave in enumerate(pack(operations)):
        if number == 1:
            (lane,) = _current_lane
            (_directory / f"{lane}.{_worker}").touch()
            until(partial(_both_arrived, lane), within=100, what=f"both are at lane {lane}")
        yield wave


def _both_arrived(lane: int) -> bool:
    return len(list(_directory.glob(f"{lane}.*"))) == 2


Poller._expiring_leases = lambda _: []  # type: ignore[method-assign,assignment]  # no lease is extended, so messages reappear
Writer._apply = _apply_current  # type: ignore[method-assign]
mdstore.store.writer.pack = _pack_with_barrier  # type: ignore[assignment,attr-defined]
app = create_store_app()
