"""The three tasks: each translates a message into calls of the store.

ingest       one lane: apply it and finish here; many: chord(group(apply_lane * N), finish)
apply_lane   one lane; the one with the highest number also finishes, if it is the last to end
finish       the request's final state, from the lane summaries in the ledger
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery import chord

from mdstore.errors import IntegrityError, InvalidRequest, MdstoreError, NotFound
from mdstore.model import FINAL_STATES, Reference, State
from mdstore.store.ledger import RequestStatus
from mdstore.tasks.ingest import IngestTask, fairness_options
from mdstore.tasks.task import StoreTask, read_reference, start

if TYPE_CHECKING:
    from mdstore.tasks.app import StoreApp

_FINISH_EVERY = 5  # seconds
_FINISH_TRIES = 360


def register(app: StoreApp) -> None:
    """Give an app the three tasks. One that hangs is killed, and its lane goes on from its receipts."""
    options: dict[str, Any] = {"bind": True, "shared": False, "time_limit": app.settings.task_time_limit}
    app.task(ingest, name="mdstore.ingest", base=IngestTask, typing=False, **options)
    app.task(apply_lane, name="mdstore.apply_lane", base=StoreTask, ignore_result=True, **options)
    app.task(finish, name="mdstore.finish", base=StoreTask, **options)


def ingest(self: IngestTask, message: dict[str, Any]) -> dict[str, Any]:
    """Apply a request, or spread its lanes over the workers. Its result is the request's summary."""
    if self.request.called_directly or self.request.is_eager:
        raise InvalidRequest(field="ingest", value="called in place", expected="ingest.delay(operations), or a worker")

    def apply_or_start(reference: Reference) -> tuple[RequestStatus, list[int]]:
        if reference.lanes <= 1:
            return self.store.writer.apply_request(reference), []
        status, missing = start(self.store, reference)
        if status.state is State.COMPLETED or not missing:
            return self.store.ledger.finish(reference.request_id), []
        return status, missing

    status, missing = self.process(message, apply_or_start)
    if not missing:
        return status.summary()
    tasks, options = self.app.tasks, fairness_options(status.reference)
    header = [tasks["mdstore.apply_lane"].si(message, lane).set(**options) for lane in missing]
    raise self.replace(chord(header, tasks["mdstore.finish"].si(message).set(**options), app=self.app))


def apply_lane(self: StoreTask, message: dict[str, Any], lane: int) -> None:
    """Apply one lane."""
    # To `process`, None would be the whole request; here it is no lane, as is -1.
    number = -1 if lane is None else lane
    self.process(message, lambda reference: self.store.writer.apply_lane(reference, lane), lane=number)
    reference = read_reference(message)
    if lane == reference.lanes - 1:  # often the last to end: whoever waits for the request is spared a message
        with suppress(MdstoreError):  # `finish` follows all the same
            self.store.ledger.finish(reference.request_id)


def finish(self: StoreTask, message: dict[str, Any]) -> dict[str, Any]:
    """Set the request's final state. Lanes that another delivery still works on are waited for."""

    def finished(reference: Reference) -> RequestStatus:
        try:
            return self.store.ledger.finish(reference.request_id)
        except NotFound as error:
            raise IntegrityError(f"{error}: nothing was begun that could be finished") from error

    status = self.process(message, finished)
    if status.state in FINAL_STATES:
        return status.summary()
    raise self.retry(countdown=_FINISH_EVERY, max_retries=_FINISH_TRIES)
