"""Waits for requests to end. One reader polls for all waiting calls, so that they take no threads from other calls."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import anyio

from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.model import FINAL_STATES
from mdstore.store.ledger import RequestStatus

logger = logging.getLogger(__name__)
#: Reads the statuses of some requests at once, by request id. Unknown requests are left out.
ReadStatuses = Callable[[Sequence[str]], Mapping[str, RequestStatus]]
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25  # seconds between two reads of a request's state
_AFTER_FAILURE = 5.0  # seconds until states that could not be read are read again
_DISCONNECT_CHECK = 1.0  # seconds between two checks whether a client is still there


class _Call:
    """A call that waits for a request."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = anyio.Event()
        self.final: RequestStatus | None = None
        self.pause = _FIRST_PAUSE
        self.next_read = 0.0


class StatusPoller:
    """Polls the states of the requests that calls wait for. `run` reads many per call to AWS."""

    def __init__(self, read: ReadStatuses) -> None:
        self._read = read
        self._calls: set[_Call] = set()
        self._wake = anyio.Event()

    async def until_final(
        self, request_id: str, *, seconds: float, is_disconnected: Callable[[], Awaitable[bool]]
    ) -> RequestStatus | None:
        """Return the request's status when it is final, or None after `seconds` or when the client has disconnected."""
        call = _Call(request_id)
        self._calls.add(call)
        self._wake.set()
        try:
            with anyio.move_on_after(seconds):
                while not call.final and not await is_disconnected():
                    with anyio.move_on_after(_DISCONNECT_CHECK):
                        await call.ended.wait()
        finally:
            self._calls.discard(call)
        return call.final

    async def run(self) -> None:
        """Read states for as long as the application runs."""
        thread = anyio.CapacityLimiter(1)
        while True:
            if not self._calls:
                self._wake = anyio.Event()
                await self._wake.wait()
            due = [call for call in self._calls if call.next_read <= anyio.current_time()]
            if due:
                ids = list({call.request_id for call in due})
                found = await anyio.to_thread.run_sync(partial(self._statuses, ids), limiter=thread)
                if found is None:
                    await anyio.sleep(_AFTER_FAILURE)
                else:
                    _update(due, found)
            await anyio.sleep(_FIRST_PAUSE)

    def _statuses(self, request_ids: Sequence[str]) -> Mapping[str, RequestStatus] | None:
        # The requests are durable. Failing to read their states must not turn the responses into errors.
        try:
            return self._read(request_ids)
        except (Unavailable, DeploymentBroken) as error:
            logger.warning("the states of requests that calls wait for cannot be read: %s", error)
        except Exception:
            logger.exception("the states of requests that calls wait for cannot be read")
        return None


def _update(calls: Sequence[_Call], found: Mapping[str, RequestStatus]) -> None:
    now = anyio.current_time()
    for call in calls:
        status = found.get(call.request_id)
        if status is not None and status.state in FINAL_STATES:
            call.final = status
            call.ended.set()
        call.next_read = now + call.pause
        call.pause = min(_LONGEST_PAUSE, call.pause * 1.5)
