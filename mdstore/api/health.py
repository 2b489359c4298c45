"""Health: `/livez` says that this process serves, `/readyz` that bucket, ledger and queue answer it."""

from __future__ import annotations

import logging
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
#: Seconds that the parts have to answer, all together.
PATIENCE = 3.0
#: Threads for looks, besides those of the requests: looks that hang must not take theirs, nor add up.
THREADS = 4 * 3
# A request's id that nobody can use: a look at it says whether the table answers.
_NOBODY = "-"


@router.get("/livez", responses={200: {"model": models.Health}})
async def livez() -> Response:
    """200 while this process serves, whatever AWS does: restarting it would mend nothing there."""
    return answers.json({"status": "ok"})


@router.get("/readyz", responses={200: {"model": models.Health}, **problems.documented(503)})
async def readyz(request: Request, client: TheClient) -> Response:
    """200 when the bucket, the ledger's table and the queue answer; else 503 that names those that do not."""
    failing = await _failing(client.store, request.app.state.look_threads)
    if not failing:
        return answers.json({"status": "ok"})
    return problems.answer(
        request,
        status=503,
        title="Not ready",
        name="not-ready",
        detail=f"No answer as it should be from: {', '.join(failing)}.",
        headers={"Retry-After": "5"},
        failing=failing,
    )


def _bucket(store: Store) -> None:
    store.objects.ping()


def _ledger(store: Store) -> None:
    try:
        store.ledger.get(_NOBODY)
    except NotFound:
        return


def _queue(store: Store) -> None:
    store.aws.sqs.get_queue_url(QueueName=store.settings.queue)


_PARTS: Mapping[str, Callable[[Store], None]] = {"bucket": _bucket, "ledger": _ledger, "queue": _queue}


async def _failing(store: Store, threads: anyio.CapacityLimiter) -> list[str]:
    well: set[str] = set()

    async def look(part: str) -> None:
        if await anyio.to_thread.run_sync(_answers, part, store, limiter=threads, abandon_on_cancel=True):
            well.add(part)

    with anyio.move_on_after(PATIENCE):
        async with anyio.create_task_group() as group:
            for part in _PARTS:
                group.start_soon(look, part)
    return [part for part in _PARTS if part not in well]


def _answers(part: str, store: Store) -> bool:
    try:
        _PARTS[part](store)
    except Exception:
        logger.exception("not ready: %s", part)
        return False
    return True
