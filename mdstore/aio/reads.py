"""Reads of records and of requests' states, for the coroutines of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from mdstore.aio.batch_loader import BatchLoader
from mdstore.aio.status_poller import StatusPoller
from mdstore.aws.dynamodb.attributes import Item, is_small
from mdstore.model import State, check_request_id
from mdstore.store import Store
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.records import Key, Record, existing

T = TypeVar("T")
_RECORD_CALLS = 4  # BatchGetItem calls that are under way at most; see docs/adr/0023-reads-on-the-event-loop.md
_STATUS_CALLS = 2


class Reads:
    """Reads records and states. Coroutines that ask at the same time share calls.

    Threads of `executor` (if it is None, those of the event loop) do what would block: they read data in S3, large items, and
    the counts of unfinished requests.
    """

    def __init__(self, store: Store, executor: Executor | None = None) -> None:
        self._store = store
        self._executor = executor
        self._runner = store.aws.dynamo.event_loop_runner()
        self._records = BatchLoader(self._items, calls=_RECORD_CALLS)
        self._statuses = BatchLoader(self._known_statuses, calls=_STATUS_CALLS)
        self.poller = StatusPoller(self._known_statuses)

    async def record(self, entity: str, key: str) -> Record:
        """Read one record with strong consistency. Raises `NotFound`."""
        item = await self._records.get((entity, key))
        if item is None:
            return existing(None, entity, key)
        if "blob" in item or not is_small(item):
            return existing(await self._in_thread(partial(self._store.records.read, item)), entity, key)
        return existing(self._store.records.read(item), entity, key)

    async def status(self, request_id: str) -> RequestStatus:
        """Return a request's state, and its counts so far. Raises `NotFound`."""
        found = await self._statuses.get(check_request_id(request_id))
        if found is not None and found.state is State.COMPLETED:
            return found
        # The counts so far are in the lanes' summaries, and a request without a record in the ledger may have a payload.
        return await self._in_thread(partial(self._store.ingestor.status, request_id))

    def close(self) -> None:
        """Close all connections, and cancel who still waits."""
        self.poller.close()
        self._records.close()
        self._statuses.close()
        self._runner.close()

    async def _items(self, keys: Sequence[Key]) -> Mapping[Key, Item]:
        return await self._runner.run(self._store.records.items(keys))

    def _known_statuses(self, request_ids: Sequence[str]) -> Awaitable[Mapping[str, RequestStatus]]:
        return self._in_thread(partial(self._store.ledger.get_many, request_ids))

    def _in_thread(self, call: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, call)
