"""A worker's part in repairing chords whose last part's worker died before it had published the callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mdstore.log import event
from mdstore.queue.results.backend import DynamoBackend
from mdstore.queue.worker.periodic import PeriodicStep


class RecoveryStep(PeriodicStep):
    """Every worker looks for such chords, in turns: a chord that was looked at is left alone for a while."""

    work_name = "chords"
    interval = 60.0

    def include_if(self, parent: Any) -> bool:
        """Only where chords are this project's."""
        return isinstance(parent.app.backend, DynamoBackend)

    def work(self, stopping: Callable[[], bool]) -> bool:  # noqa: ARG002
        """Publish their callbacks."""
        repaired = self.app.backend.repair()
        if repaired:
            event("chords.repaired", count=len(repaired), chords=",".join(repaired))
        return False
