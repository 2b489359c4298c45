"""Waits for requests to end. One reader polls for all who wait, and reads many states per call to AWS."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.model import FINAL_STATES
from mdstore.store.ledger_items import RequestStatus

logger = logging.getLogger(__name__)
#: Reads the statuses of some requests at once, by request id. Unknown requests are left out.
ReadStatuses = Callable[[Sequence[str]], Awaitable[Mapping[str, RequestStatus]]]
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25  # seconds between two reads of a request's state
_AFTER_FAILURE = 5.0  # seconds until states that could not be read are read again
_GONE_CHECK = 1.0  # seconds between two checks whether the caller is still there


class _Wait:
    """One caller's wait for a request."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.final: asyncio.Future[RequestStatus] = asyncio.get_running_loop().create_future()
        self.pause = _FIRST_PAUSE
        self.next_read = 0.0


class StatusPoller:
    """Polls the states of requests while someone waits for one. It belongs to the event loop in which it is used."""

    def __init__(self, read: ReadStatuses) -> None:
        self._read = read
        self._waits: set[_Wait] = set()
        self._polling: asyncio.Task[None] | None = None

    async def until_final(
        self, request_id: str, *, seconds: float, is_gone: Callable[[], Awaitable[bool]] | None = None
    ) -> RequestStatus | None:
        """Return the request's status when it is final, or None after `seconds`, or when `is_gone` says that nobody waits."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        wait = _Wait(request_id)
        self._waits.add(wait)
        if self._polling is None or self._polling.done():
            self._polling = loop.create_task(self._poll())
        try:
            while (left := deadline - loop.time()) > 0 and not (is_gone and await is_gone()):
                await asyncio.wait([wait.final], timeout=min(left, _GONE_CHECK))
                if wait.final.done():
                    return wait.final.result()
        finally:
            self._waits.discard(wait)
        return None

    def close(self) -> None:
        """Stop polling. Who still waits is cancelled."""
        if self._polling is not None:
            self._polling.cancel()
        for wait in self._waits:
            wait.final.cancel()

    async def _poll(self) -> None:
        """Read states for as long as someone waits."""
        loop = asyncio.get_running_loop()
        while self._waits:
            due = [wait for wait in self._waits if wait.next_read <= loop.time()]
            if due:
                found = await self._statuses(list({wait.request_id for wait in due}))
                if found is None:
                    await asyncio.sleep(_AFTER_FAILURE)
                else:
                    _update(due, found, loop.time())
            await asyncio.sleep(_FIRST_PAUSE)

    async def _statuses(self, request_ids: Sequence[str]) -> Mapping[str, RequestStatus] | None:
        # The requests are durable. Failing to read their states must not turn waiting into an error.
        try:
            return await self._read(request_ids)
        except (Unavailable, DeploymentBroken) as error:
            logger.warning("the states of requests that callers wait for cannot be read: %s", error)
        except Exception:
            logger.exception("the states of requests that callers wait for cannot be read")
        return None


def _update(waits: Sequence[_Wait], found: Mapping[str, RequestStatus], now: float) -> None:
    for wait in waits:
        status = found.get(wait.request_id)
        if status is not None and status.state in FINAL_STATES and not wait.final.done():
            wait.final.set_result(status)
        wait.next_read = now + wait.pause
        wait.pause = min(_LONGEST_PAUSE, wait.pause * 1.5)
