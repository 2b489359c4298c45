"""The data store's app, whose jobs are recorded.

Each job appends the number of its messages to the file `JOURNAL`. A pool process kills itself before its completion number
`DIE_AT`, unless the file `DIED` shows that one did. `RATE` is the rate limit of `mdstore.ingest`.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdstore.aws.concurrent import Task
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.tasks import create_store_app
from mdstore.tasks.ingest import IngestTask
from tests.integration.transport_app import record

_completions = itertools.count(1)
_prepare, _complete = IngestTask.prepare, Ledger.complete_task


def _recorded_prepare(self: IngestTask, arguments: Sequence[Sequence[Any]]) -> list[Any]:
    record(str(len(arguments)))
    return list(_prepare(self, arguments))


def _deadly_complete(self: Ledger, *args: Any, **kwargs: Any) -> Task[RequestStatus]:
    died = Path(os.environ["DIED"])
    if next(_completions) == int(os.environ["DIE_AT"]) and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _complete(self, *args, **kwargs)


IngestTask.prepare = _recorded_prepare  # type: ignore[method-assign]
if "DIE_AT" in os.environ:
    Ledger.complete_task = _deadly_complete  # type: ignore[method-assign]

app = create_store_app()
app.conf.task_annotations = {"mdstore.ingest": {"rate_limit": os.environ.get("RATE")}}
