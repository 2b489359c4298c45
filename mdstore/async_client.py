"""The library's interface for asyncio: submit requests, wait for them, read records, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mdstore.aio import commits
from mdstore.aio.reads import Reads
from mdstore.client import Client, Receipt, still_waiting
from mdstore.model import FINAL_STATES, Outcome
from mdstore.settings import Settings
from mdstore.store.batch import is_small
from mdstore.store.group_commit import GroupCommit
from mdstore.store.ingestor import Accepted, OnInvalid
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.outcomes import Only
from mdstore.store.payload_builder import OperationInput
from mdstore.store.records import Record

if TYPE_CHECKING:
    from mdstore.tasks.app import StoreApp

T = TypeVar("T")
#: The most requests that are encoded and sent at once.
SUBMIT_THREADS = 8
_READ_THREADS = 16
_SHORT, _SHORT_BYTES = 32, 2**14  # operations, and bytes of those that are given as JSON


class AsyncSubmission(Receipt):
    """A request that is stored durably."""

    def __init__(self, client: AsyncClient, accepted: Accepted) -> None:
        super().__init__(accepted)
        self._client = client

    async def status(self) -> RequestStatus:
        """Return the request's state and its counts so far. Raises `NotFound`."""
        return await self._client.status(self.request_id)

    async def wait(self, timeout: float = 60.0) -> AsyncSubmission:
        """Wait until the state is final, then return this submission. Raises `Unavailable` after `timeout` seconds."""
        await self._client.wait(self.request_id, timeout=timeout)
        return self

    def outcomes(self, only: Only | None = None) -> AsyncIterator[Outcome]:
        """Yield the outcomes known so far, in the order of the lanes."""
        return self._client.outcomes(self.request_id, only=only)


class AsyncClient:
    """What producers and readers call from coroutines. Use it as an async context manager, in one event loop."""

    def __init__(
        self, settings: Settings | None = None, *, app: StoreApp | None = None, client: Client | None = None
    ) -> None:
        self._client = client or Client(settings, app=app)

    async def __aenter__(self) -> Self:
        self._submits = ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="mdstore-submit")
        self._blocking = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="mdstore-read")
        # Building the clients of AWS takes some tenths of a second.
        store = await asyncio.to_thread(lambda: self._client.store)
        self._reads = Reads(store, self._blocking)
        self._group_commit: GroupCommit | None = None
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reads.close()
        for threads in (self._submits, self._blocking):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def settings(self) -> Settings:
        """The settings."""
        return self._client.settings

    async def submit(
        self,
        operations: Iterable[OperationInput],
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        newest_wins: bool = False,
    ) -> AsyncSubmission:
        """Store `operations` as a durable request and send its message, as `Client.submit` does.

        A short list of operations is checked at once; any other iterable is read in another thread. Small requests that are
        submitted at the same time share a payload and a message. Raises what `Client.submit` raises.
        """
        options: Any = {
            "request_id": request_id,
            "source": source,
            "on_invalid": on_invalid,
            "newest_wins": newest_wins,
        }
        return AsyncSubmission(self, await self._accept(operations, options))

    async def status(self, request_id: str) -> RequestStatus:
        """Return a request's state and its counts so far. Raises `NotFound`."""
        return await self._reads.status(request_id)

    async def wait(self, request_id: str, *, timeout: float = 60.0) -> RequestStatus:
        """Wait until the request's state is final, and return its status.

        All who wait share the calls that read states. Raises `NotFound`, and `Unavailable` after `timeout` seconds.
        """
        request = await self.status(request_id)
        if request.state in FINAL_STATES:
            return request
        found = await self.until_final(request_id, seconds=timeout)
        if found is None:
            raise still_waiting(request, timeout)
        return found

    async def until_final(
        self, request_id: str, *, seconds: float, is_gone: Callable[[], Awaitable[bool]] | None = None
    ) -> RequestStatus | None:
        """Return the request's status when it is final, or None after `seconds`, or when `is_gone` says that nobody waits."""
        return await self._reads.poller.until_final(request_id, seconds=seconds, is_gone=is_gone)

    async def outcomes(self, request_id: str, *, only: Only | None = None) -> AsyncIterator[Outcome]:
        """Yield the outcomes known so far, in the order of the lanes. Raises `NotFound`."""
        outcomes = self._client.store.outcomes
        cursor: str | None = None
        request = await self.status(request_id)
        while True:
            page, cursor = await self._in_thread(partial(outcomes.page, request, only=only, cursor=cursor))
            for outcome in page:
                yield outcome
            if cursor is None:
                return

    async def get(self, entity: str, key: str) -> Record:
        """Read one record with strong consistency. Raises `NotFound`.

        Reads share calls: what is asked for while calls are under way is read by the next one.
        """
        return await self._reads.record(entity, key)

    async def _accept(self, operations: Iterable[OperationInput], options: Any) -> Accepted:
        if self._group_commit is None:  # loading Celery takes some tenths of a second, and readers need none
            self._group_commit = await self._in_thread(lambda: self._client.app.group_commit)
        ingest, ingestor = self._client.ingest, self._client.store.ingestor
        if not _is_short(operations):
            return await self._in_thread(partial(ingest.accept, operations, **options), self._submits)
        built = ingestor.build(operations, **options)
        if built.invalid is None and is_small(built.builder):
            return await commits.submit(self._group_commit, built)
        with closing(built.builder):
            return await self._in_thread(partial(ingestor.accept_built, built, publish=ingest.publish), self._submits)

    def _in_thread(self, call: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(threads or self._blocking, call)


def _is_short(operations: Iterable[OperationInput]) -> bool:
    """Return whether operations are checked so fast that no thread is needed."""
    if not isinstance(operations, list | tuple) or len(operations) > _SHORT:
        return False
    return sum(len(one) for one in operations if isinstance(one, bytes | str)) <= _SHORT_BYTES
