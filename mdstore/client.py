"""The library's face: submit requests, wait for them, read records. `mdstore` exports one that is made from the settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from mdstore.errors import NotFound, Unavailable
from mdstore.model import FINAL_STATES, Outcome
from mdstore.settings import Settings, load_settings
from mdstore.store import Store
from mdstore.store.ingestor import Accepted, OnInvalid
from mdstore.store.ledger import RequestStatus
from mdstore.store.outcomes import Only
from mdstore.store.payload_builder import OperationInput
from mdstore.store.records import Record
from mdstore.store.verify import Verification
from mdstore.tasks.app import StoreApp, create_store_app
from mdstore.tasks.ingest import IngestTask


class Submission:
    """A durable request. `new` is False where it was accepted before, `sent` where it needed not be sent again."""

    def __init__(self, client: Client, accepted: Accepted) -> None:
        self._client = client
        self.request_id = accepted.reference.request_id
        self.operations = accepted.operations
        self.new = accepted.new
        self.sent = accepted.published is not None

    def __repr__(self) -> str:
        return f"<Submission {self.request_id!r}, {self.operations} operations>"

    def status(self) -> RequestStatus:
        """State and counts so far."""
        return self._client.status(self.request_id)

    def wait(self, timeout: float = 60.0) -> Submission:
        """Return when the state is final. Raises `Unavailable` after `timeout` seconds."""
        self._client.wait(self.request_id, timeout=timeout)
        return self

    def outcomes(self, only: Only | None = None) -> Iterator[Outcome]:
        """Every outcome there is by now."""
        return self._client.outcomes(self.request_id, only=only)


class Client:
    """All that a producer or reader does, over one store and one Celery app."""

    def __init__(self, settings: Settings | None = None, *, app: StoreApp | None = None) -> None:
        self._given = settings
        self._app = app

    @cached_property
    def settings(self) -> Settings:
        """The settings, read on first use."""
        if self._app is not None:
            return self._app.settings
        return self._given or load_settings().settings

    @cached_property
    def app(self) -> StoreApp:
        """The Celery app that messages are sent with."""
        return self._app or create_store_app(self.settings)

    @property
    def store(self) -> Store:
        """The core's parts."""
        return self.app.store

    @property
    def ingest(self) -> IngestTask:
        """The Celery task: `.delay(operations)` stores the payload and sends its reference."""
        task: IngestTask = self.app.tasks["mdstore.ingest"]
        return task

    def submit(
        self,
        operations: Iterable[OperationInput],
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
    ) -> Submission:
        """Make `operations` (any iterable, read once) a durable request.

        Raises `InvalidOperations` where any is invalid, unless `on_invalid="refuse"`; `RequestConflict` where
        `request_id` was used for other content, or more than 14 days ago.
        """
        accepted = self.ingest.accept(operations, request_id=request_id, source=source, on_invalid=on_invalid)
        return Submission(self, accepted)

    def status(self, request_id: str) -> RequestStatus:
        """State and counts so far. Raises `NotFound`."""
        return self.store.ingestor.status(request_id)

    def wait(
        self,
        request_id: str,
        *,
        timeout: float = 60.0,
        interval: float = 0.2,
        progress: Callable[[RequestStatus], None] | None = None,
    ) -> RequestStatus:
        """Return the request when its state is final. Raises `Unavailable` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        pause = 0.01
        while True:
            request = self.status(request_id) if progress else self._state(request_id)
            if progress:
                progress(request)
            if request.state in FINAL_STATES:
                return request
            if time.monotonic() >= deadline:
                raise Unavailable(f"request {request_id!r} is still {request.state} after {timeout} s", code="Timeout")
            time.sleep(pause)
            pause = min(interval, pause * 1.5)

    def _state(self, request_id: str) -> RequestStatus:
        """Like `status`, without reading the lanes that are done."""
        try:
            return self.store.ledger.get(request_id)
        except NotFound:
            return self.status(request_id)

    def outcomes(self, request_id: str, *, only: Only | None = None) -> Iterator[Outcome]:
        """Every outcome there is by now, in the order of the lanes. Raises `NotFound`."""
        return self.store.outcomes.all(self.status(request_id), only=only)

    def get(self, entity: str, key: str) -> Record:
        """One record, strongly consistent. Raises `NotFound`."""
        return self.store.records.get(entity, key)

    async def aget(self, entity: str, key: str) -> Record:
        """Like `get`, without blocking the event loop."""
        return await asyncio.to_thread(self.get, entity, key)

    def export(self, entity: str | None = None) -> Iterator[Record]:
        """All records (of `entity`), in no order."""
        return self.store.records.export(entity)

    def verify(self, request_id: str) -> Verification:
        """Compare the request's inputs with its outcomes and effects. Raises `NotFound`."""
        return self.store.verifier.verify(self.status(request_id))
