"""Health checks: `/livez` shows that this process serves; `/readyz` also checks that bucket, ledger and queue respond."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import anyio
from fastapi import APIRouter, Request
from starlette.responses import Response

from mdstore.api import answers, models, problems
from mdstore.api.auth import TheClient
from mdstore.errors import NotFound
from mdstore.store import Store

logger = logging.getLogger(__name__)
router = APIRouter(tags=["health"])
#: Seconds within which all parts together must respond.
PATIENCE = 3.0
#: Health checks have threads of their own: hanging checks must not take threads from other calls, nor pile up without limit.
THREADS = 4 * 3
FRESH = 1.0  # seconds for which an answer is reused
# No request can have this id, so reading it only tells whether the table responds.
_UNUSED_REQUEST_ID = "-"


@router.get("/livez", responses={200: {"model": models.Health}})
async def livez() -> Response:
    """Return 200 while this process serves, even if AWS is down: a restart would not fix AWS."""
    return answers.json({"status": "ok"})


@router.get("/readyz", responses={200: {"model": models.Health}, **problems.documented(503)})
async def readyz(request: Request, client: TheClient) -> Response:
    """Return 200 if the bucket, the ledger table and the queue respond, otherwise 503 with the names of the failing parts."""
    failing = await request.app.state.readiness.failing(client.store, request.app.state.health_threads)
    if not failing:
        return answers.json({"status": "ok"})
    return problems.answer(
        request,
        status=503,
        title="Not ready",
        name="not-ready",
        detail=f"These parts failed or did not respond in time: {', '.join(failing)}.",
        headers={"Retry-After": "5"},
        failing=failing,
    )


class Readiness:
    """Checks the parts at most once a second. All callers of that second get the same answer."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = anyio.Lock()
        self._until = 0.0
        self._failing: list[str] = []

    async def failing(self, store: Store, threads: anyio.CapacityLimiter) -> list[str]:
        """Return the names of the parts that failed."""
        async with self._lock:
            if self._clock() >= self._until:
                self._failing = await _failing(store, threads)
                self._until = self._clock() + FRESH
            return self._failing


def _bucket(store: Store) -> None:
    store.objects.ping()


def _ledger(store: Store) -> None:
    try:
        store.ledger.get(_UNUSED_REQUEST_ID)
    except NotFound:
        return


def _queue(store: Store) -> None:
    store.aws.sqs.get_queue_url(QueueName=store.settings.queue)


_PARTS: Mapping[str, Callable[[Store], None]] = {"bucket": _bucket, "ledger": _ledger, "queue": _queue}


async def _failing(store: Store, threads: anyio.CapacityLimiter) -> list[str]:
    healthy: set[str] = set()

    async def check(part: str) -> None:
        if await anyio.to_thread.run_sync(_responds, part, store, limiter=threads, abandon_on_cancel=True):
            healthy.add(part)

    with anyio.move_on_after(PATIENCE):
        async with anyio.create_task_group() as group:
            for part in _PARTS:
                group.start_soon(check, part)
    return [part for part in _PARTS if part not in healthy]


def _responds(part: str, store: Store) -> bool:
    try:
        _PARTS[part](store)
    except Exception:
        logger.exception("not ready: %s", part)
        return False
    return True
