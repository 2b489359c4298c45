"""A worker that waits, after the first wave of a lane, until the other worker has come as far with the same lane.

`celery -A tests.chaos.barrier worker`; `MEETING` is a directory that both know, `MEETING_WORKER` this one's name.
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

_place = Path(os.environ["MEETING"])
_name = os.environ["MEETING_WORKER"]
_apply = Writer._apply
_at_work: list[int] = []  # the lane that this process of the pool is applying


def _applying(self: Writer, reference: Reference, lane: int) -> LaneSummary:
    _at_work[:] = [lane]
    return _apply(self, reference, lane)


def _packed(operations: Sequence[Indexed]) -> Iterator[list[Transaction]]:
    for number, wave in enumerate(pack(operations)):
        if number == 1:
            (lane,) = _at_work
            (_place / f"{lane}.{_name}").touch()
            until(partial(_have_met, lane), within=100, what=f"both are at lane {lane}")
        yield wave


def _have_met(lane: int) -> bool:
    return len(list(_place.glob(f"{lane}.*"))) == 2


Poller._expiring_leases = lambda _: []  # type: ignore[method-assign,assignment]  # else no message would become visible again
Writer._apply = _applying  # type: ignore[method-assign]
mdstore.store.writer.pack = _packed  # type: ignore[assignment,attr-defined]
app = create_store_app()
