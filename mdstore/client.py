"""The library's interface: submit requests, wait for them, read records.

The package `mdstore` exports the methods of a default client.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from mdstore.aio.reads import Reads
from mdstore.errors import NotFound, Unavailable
from mdstore.model import FINAL_STATES, Outcome
from mdstore.settings import Settings, load_settings
from mdstore.store import Store
from mdstore.store.ingestor import Accepted, OnInvalid
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.outcomes import Only
from mdstore.store.payload_builder import OperationInput
from mdstore.store.records import Record
from mdstore.store.verify import Verification

if TYPE_CHECKING:
    from mdstore.tasks.app import StoreApp
    from mdstore.tasks.ingest import IngestTask

_LANES_PER_SECOND = (
    1_000  # summaries of lanes that one waiting client reads: about 75 of its partition's 3,000 read units
)


class Receipt:
    """Tells that a request is stored durably.

    `new` is False if the request had been accepted before. `sent` is False if no message had to be sent.
    """

    def __init__(self, accepted: Accepted) -> None:
        self.request_id = accepted.request_id
        self.operations = accepted.operations
        self.new = accepted.new
        self.sent = accepted.published is not None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.request_id!r}, {self.operations} operations>"


class Submission(Receipt):
    """A request that is stored durably."""

    def __init__(self, client: Client, accepted: Accepted) -> None:
        super().__init__(accepted)
        self._client = client

    def status(self) -> RequestStatus:
        """Return the request's state and its counts so far. Raises `NotFound`."""
        return self._client.status(self.request_id)

    def wait(self, timeout: float = 60.0) -> Submission:
        """Wait until the state is final, then return this submission. Raises `Unavailable` after `timeout` seconds."""
        self._client.wait(self.request_id, timeout=timeout)
        return self

    def outcomes(self, only: Only | None = None) -> Iterator[Outcome]:
        """Yield the outcomes known so far, in the order of the lanes."""
        return self._client.outcomes(self.request_id, only=only)


class Client:
    """What producers and readers call: one store and one Celery app behind one object."""

    def __init__(self, settings: Settings | None = None, *, app: StoreApp | None = None) -> None:
        self._given_settings = settings
        self._app = app
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._reads: WeakKeyDictionary[asyncio.AbstractEventLoop, Reads] = WeakKeyDictionary()

    @cached_property
    def settings(self) -> Settings:
        """The settings; they are read on first use."""
        if self._app is not None:
            return self._app.settings
        return self._given_settings or load_settings().settings

    @property
    def app(self) -> StoreApp:
        """The Celery app that sends the messages."""
        if self._app is None:
            from mdstore.tasks.app import create_store_app  # noqa: PLC0415  reading needs no Celery, which loads slowly

            with self._lock:
                if self._app is None:
                    self._app = create_store_app(self.settings, store=self._store, set_as_current=False)
        return self._app

    @property
    def store(self) -> Store:
        """The data store; if there is an app, the one that its tasks use."""
        if self._app is not None:
            return self._app.store
        store = self._store
        if store is None or store.aws.owner_pid != os.getpid():
            with self._lock:
                store = self._store
                if store is None or store.aws.owner_pid != os.getpid():
                    store = self._store = Store(self.settings)
        return store

    @property
    def ingest(self) -> IngestTask:
        """The Celery task `mdstore.ingest`: `.delay(operations)` stores the payload in S3 and sends a reference to it."""
        task: IngestTask = self.app.tasks["mdstore.ingest"]
        return task

    def submit(
        self,
        operations: Iterable[OperationInput],
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        newest_wins: bool = False,
    ) -> Submission:
        """Store `operations` (any iterable, read once) as a durable request and send its message.

        If an operation is invalid, this raises `InvalidOperations` and stores nothing. With `on_invalid="refuse"`, invalid
        operations are refused and the others are applied. With `newest_wins`, each key ends in the state of its operation with
        the highest sequence, in whatever order requests are applied: inserts and updates are then upserts.

        Raises `RequestConflict` if `request_id` was used before for other content, or for a request that is more than 14 days
        old and not known to be completed.
        """
        accepted = self.ingest.accept(
            operations, request_id=request_id, source=source, on_invalid=on_invalid, newest_wins=newest_wins
        )
        return Submission(self, accepted)

    def status(self, request_id: str) -> RequestStatus:
        """Return a request's state and its counts so far. Raises `NotFound`."""
        return self.store.ingestor.status(request_id)

    def wait(
        self,
        request_id: str,
        *,
        timeout: float = 60.0,
        interval: float = 0.2,
        progress: Callable[[RequestStatus], None] | None = None,
    ) -> RequestStatus:
        """Wait until the request's state is final, and return its status.

        The request is polled every `interval` seconds, more often at first. `progress` is called with its status, whose counts
        are then up to date: a second later for each 1,000 lanes, because reading their summaries takes from the throughput of
        the partition that the lanes write them to. Raises `Unavailable` after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        pause, next_progress = 0.01, 0.0
        while True:
            is_due = progress is not None and time.monotonic() >= next_progress
            request = self.status(request_id) if is_due else self._state(request_id)
            is_final = request.state in FINAL_STATES  # then its counts are complete without the lanes
            if progress and (is_due or is_final):
                progress(request)
                next_progress = time.monotonic() + request.lanes / _LANES_PER_SECOND
            if is_final:
                return request
            if time.monotonic() >= deadline:
                raise still_waiting(request, timeout)
            time.sleep(pause)
            pause = min(interval, pause * 1.5)

    def _state(self, request_id: str) -> RequestStatus:
        """Read the request's state without its lane summaries, and so without the counts of an unfinished request."""
        try:
            return self.store.ledger.get(request_id)
        except NotFound:
            return self.status(request_id)

    def outcomes(self, request_id: str, *, only: Only | None = None) -> Iterator[Outcome]:
        """Yield the outcomes known so far, in the order of the lanes. Raises `NotFound`."""
        return self.store.outcomes.all(self.status(request_id), only=only)

    def get(self, entity: str, key: str) -> Record:
        """Read one record with strong consistency. Raises `NotFound`."""
        return self.store.records.get(entity, key)

    async def aget(self, entity: str, key: str) -> Record:
        """Read one record like `get`, without blocking the event loop. Reads share calls, as those of `AsyncClient`."""
        loop = asyncio.get_running_loop()
        if loop not in self._reads:
            store = await asyncio.to_thread(lambda: self.store)  # building it takes some tenths of a second
            self._reads.setdefault(loop, Reads(store))
        return await self._reads[loop].record(entity, key)

    def export(self, entity: str | None = None) -> Iterator[Record]:
        """Yield all records, or those of one `entity`, in no particular order."""
        return self.store.records.export(entity)

    def verify(self, request_id: str) -> Verification:
        """Compare the request's inputs with its outcomes and effects. Raises `NotFound`."""
        return self.store.verifier.verify(self.status(request_id))


def still_waiting(request: RequestStatus, timeout: float) -> Unavailable:
    """Return the error of a wait that has ended before its request."""
    text = f"request {request.request_id!r} is still {request.state} after {timeout} s"
    return Unavailable(text, code="Timeout")
