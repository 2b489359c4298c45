"""The front door's application, put together. Serving it is uvicorn's: `uvicorn --factory mdstore.api:create_api`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from mdstore.api import health, models, problems, records, requests
from mdstore.client import Client
from mdstore.settings import Settings

DESCRIPTION = """\
Operations in, records out. A request is acknowledged when it is durable: its payload in S3 and its message in SQS.
Each of its operations then takes effect exactly once, and its outcome can be looked up.

Numbers are exact: integers and decimals to 38 digits, as JSON numbers. Errors are problem documents (RFC 9457).
"""


def create_api(settings: Settings | None = None, *, client: Client | None = None) -> FastAPI:
    """Make the application over `client`, or over a client of its own. Connects to nothing until it is started.

    Raises `ConfigurationError` where the settings are wrong.
    """
    client = client or Client(settings)
    _ = client.settings  # read now, so that a wrong one stops the start
    # With the OpenAPI page's parts served from here: nothing is fetched from elsewhere.
    api = FastAPIOffline(
        title="mdstore", version=version("mdstore"), description=DESCRIPTION, lifespan=_lifespan, redoc_url=None
    )
    api.state.client = client
    api.add_api_route("/", _root, include_in_schema=False)
    for part in (requests, records, health):
        api.include_router(part.router)
    problems.install(api)
    api.openapi = _documented(api.openapi)  # type: ignore[method-assign]  # FastAPI's own way to extend the document
    return api


@asynccontextmanager
async def _lifespan(api: FastAPI) -> AsyncIterator[None]:
    api.state.submit_threads = anyio.CapacityLimiter(requests.SUBMIT_THREADS)
    api.state.look_threads = anyio.CapacityLimiter(health.THREADS)
    await run_in_threadpool(lambda: api.state.client.store)  # made now, and not while the first request waits
    yield


async def _root(request: Request) -> RedirectResponse:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")


def _documented(original: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def openapi() -> dict[str, Any]:
        document = original()
        document["components"]["schemas"].update(models.schemas())
        return document

    return openapi
