"""The worker's step that repairs chords whose callback was never published because a worker died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mdstore.log import event
from mdstore.queue.results.backend import DynamoBackend
from mdstore.queue.worker.periodic import PeriodicStep


class RecoveryStep(PeriodicStep):
    """Repairs chords once a minute.

    Every worker runs this step. A worker that checks a chord postpones the chord's next check, so others skip it meanwhile.
    """

    work_name = "chords"
    interval = 60.0

    def include_if(self, parent: Any) -> bool:
        """Run only with this project's result backend."""
        return isinstance(parent.app.backend, DynamoBackend)

    def work(self, stopping: Callable[[], bool]) -> bool:  # noqa: ARG002
        """Publish the callbacks of such chords. Return False, because nothing is left to do at once."""
        repaired = self.app.backend.repair()
        if repaired:
            event("chords.repaired", count=len(repaired), chords=",".join(repaired))
        return False
