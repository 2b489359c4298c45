"""A worker that waits after the first wave of a lane until another worker has come as far with the same lane.

Run `celery -A tests.chaos.barrier worker`; `BARRIER` names a directory that both workers use, `BARRIER_WORKER` this worker.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mdstore.aws.blobs import Blob
from mdstore.queue.broker.poller import Poller
from mdstore.store.packing import Transaction
from mdstore.store.writer import Writer
from mdstore.tasks import create_store_app
from tests.waiting import until

_directory = Path(os.environ["BARRIER"])
_worker = os.environ["BARRIER_WORKER"]
_upload = Writer._upload_large_data


def _upload_with_barrier(self: Writer, run: Any, wave: Sequence[Transaction]) -> dict[int, Blob]:
    if wave[0].number:  # the first step of a wave that is not the first
        (_directory / f"{run.lane}.{_worker}").touch()
        until(partial(_both_arrived, run.lane), within=100, what=f"both are at lane {run.lane}")
    return _upload(self, run, wave)


def _both_arrived(lane: int) -> bool:
    return len(list(_directory.glob(f"{lane}.*"))) == 2


Poller._expiring_leases = lambda _: []  # type: ignore[method-assign,assignment]  # no lease is extended, so messages reappear
Writer._upload_large_data = _upload_with_barrier  # type: ignore[method-assign]
app = create_store_app()
