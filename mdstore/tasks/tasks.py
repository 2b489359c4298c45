"""The data store's three Celery tasks. Each translates a message into calls to the store.

ingest       applies and finishes a request of one lane; for more lanes, starts chord(group(apply_lane * N), finish)
apply_lane   applies one lane; the task of the last lane also finishes the request if all other lanes are done
finish       sets the request's final state from the lane summaries in the ledger; waits until every lane has one
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery import chord

from mdstore.errors import IntegrityError, InvalidRequest, MdstoreError, NotFound
from mdstore.model import FINAL_STATES, Reference, State
from mdstore.queue.small_tasks import prepared
from mdstore.store.ledger_items import RequestStatus
from mdstore.tasks.ingest import IngestTask, fairness_options
from mdstore.tasks.task import StoreTask, read_reference, start

if TYPE_CHECKING:
    from mdstore.tasks.app import StoreApp

#: The names of the tasks, `ingest` first.
STORE_TASKS = ("mdstore.ingest", "mdstore.apply_lane", "mdstore.finish")
#: Seconds between two checks of an unfinished request: at first, and at most.
_FINISH_EVERY, _LONGEST_WAIT = 5, 60


def register(app: StoreApp) -> None:
    """Register the three tasks with an app.

    A task that exceeds its time limit is killed; after redelivery, its lane resumes from its receipts.
    """
    options: dict[str, Any] = {"bind": True, "shared": False, "time_limit": app.settings.task_time_limit}
    app.task(ingest, name="mdstore.ingest", base=IngestTask, typing=False, **options)
    app.task(apply_lane, name="mdstore.apply_lane", base=StoreTask, ignore_result=True, **options)
    app.task(finish, name="mdstore.finish", base=StoreTask, **options)


def ingest(self: IngestTask, message: dict[str, Any]) -> dict[str, Any]:
    """Apply a request of one lane, or start a chord that applies many. The task's result is the request's summary."""
    if self.request.called_directly or self.request.is_eager:
        raise InvalidRequest(
            field="ingest", value="a direct call", expected="ingest.delay(operations), run by a worker"
        )

    def apply_or_start(reference: Reference) -> tuple[RequestStatus, list[int]]:
        outcome = prepared()
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, RequestStatus):
            return outcome, []
        self.report_models(self.store.payloads.header(reference), reference)
        if reference.lanes <= 1:
            return self.store.writer.apply_request(reference, had_turns=self.is_sent_again), []
        status, missing = start(self.store, reference, by=self.request.id)
        if status.state is State.COMPLETED or not missing:
            return self.store.ledger.finish(reference.request_id), []
        return status, missing

    status, missing = self.process(message, apply_or_start)
    if not missing:
        return status.summary()
    tasks, options = self.app.tasks, fairness_options(status.reference)
    if status.started_by not in ("", self.request.id):
        # Another task has sent the lanes already. A client may wait for the result of this one, so wait for the final state.
        raise self.replace(tasks["mdstore.finish"].si(message).set(**options))
    header = [tasks["mdstore.apply_lane"].si(message, lane).set(**options) for lane in missing]
    raise self.replace(chord(header, tasks["mdstore.finish"].si(message).set(**options), app=self.app))


def apply_lane(self: StoreTask, message: dict[str, Any], lane: int) -> None:
    """Apply one lane of a request."""
    # For `process`, None means the whole request. In a message it is an invalid lane, as -1 is.
    number = -1 if lane is None else lane
    self.process(
        message,
        lambda reference: self.store.writer.apply_lane(reference, lane, had_turns=self.is_sent_again),
        lane=number,
    )
    reference = read_reference(message)
    if lane == reference.lanes - 1:
        # This lane is often the last to end. Finishing here spares the waiting client the delay of one more message.
        with suppress(MdstoreError):  # `finish` runs in any case
            self.store.ledger.finish(reference.request_id)


def finish(self: StoreTask, message: dict[str, Any]) -> dict[str, Any]:
    """Set the request's final state. While workers apply its lanes, retry; if none does, start the missing lanes again."""

    def set_final_state(reference: Reference) -> tuple[RequestStatus, bool]:
        ledger = self.store.ledger
        try:
            status = ledger.finish(reference.request_id)
        except NotFound as error:
            raise IntegrityError(f"{error}: a request that was never started cannot be finished") from error
        if status.state in FINAL_STATES:
            return status, False
        return status, status.is_abandoned(time.time(), self.store.settings.request_lease) and ledger.reopen(status)

    status, is_reopened = self.process(message, set_final_state)
    if status.state in FINAL_STATES:
        return status.summary()
    if is_reopened:
        ingest_again = self.app.tasks["mdstore.ingest"].si(message)
        raise self.replace(ingest_again.set(**fairness_options(status.reference)))
    raise self.retry(countdown=min(_FINISH_EVERY * 2 ** min(self.request.retries, 4), _LONGEST_WAIT), max_retries=None)
