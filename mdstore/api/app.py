"""The HTTP API as an ASGI application. `mdstore api` serves it, with limits on connections (see `connections`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from mdstore.api import health, models, problems, records, requests
from mdstore.api.admission import Admission
from mdstore.api.connections import Connections, limit_logs
from mdstore.api.conventions import Conventions, check_repetitions
from mdstore.api.fast_paths import FastPaths
from mdstore.async_client import AsyncClient
from mdstore.client import Client
from mdstore.settings import Settings

DESCRIPTION = """\
Submit operations and read records. A request is acknowledged once it is durable: its payload is in S3 and its message in SQS.
Then each of its operations takes effect exactly once, and its outcome can be looked up.

Numbers are exact: JSON numbers may be integers or decimals of up to 38 digits. Errors are problem documents (RFC 9457).
"""


def create_api(settings: Settings | None = None, *, client: Client | None = None) -> FastAPI:
    """Create the application with `client`, or with a client of its own. It connects to nothing until it is started.

    Raises `ConfigurationError` if a setting is wrong.
    """
    client = client or Client(settings)
    _ = client.settings  # read the settings now, so that the application does not start with a wrong one
    # FastAPIOffline serves the scripts and styles of the OpenAPI page itself, so browsers load nothing from other hosts.
    api = FastAPIOffline(
        title="mdstore",
        version=version("mdstore"),
        description=DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        dependencies=[Depends(check_repetitions)],
    )
    api.add_middleware(FastPaths)
    api.add_middleware(Conventions)  # it comes first
    api.state.client = client
    api.add_api_route("/", _root, include_in_schema=False)
    for part in (requests, records, health):
        api.include_router(part.router)
    problems.install(api)
    api.openapi = _extended(api.openapi, client.settings)  # type: ignore[method-assign]  # how FastAPI documents extending the schema
    return api


@asynccontextmanager
async def _lifespan(api: FastAPI) -> AsyncIterator[dict[str, Any]]:
    settings = api.state.client.settings
    limit_logs()
    api.state.admission = Admission(settings)
    api.state.readiness = health.Readiness()
    api.state.large_submit_threads = anyio.CapacityLimiter(requests.LARGE_SUBMIT_THREADS)
    api.state.health_threads = anyio.CapacityLimiter(health.THREADS)
    await run_in_threadpool(lambda: api.state.client.ingest)  # load Celery now, not while the first call waits
    async with AsyncClient(client=api.state.client) as api.state.async_client:
        yield {"connections": Connections(settings)}


async def _root(request: Request) -> RedirectResponse:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")


def _extended(original: Callable[[], dict[str, Any]], settings: Settings) -> Callable[[], dict[str, Any]]:
    """Add to the OpenAPI document what FastAPI does not know: the body's schemas and the settings' limits."""

    def openapi() -> dict[str, Any]:
        document = original()
        document["components"]["schemas"].update(models.schemas())
        parameters = document["paths"]["/v1/requests"]["post"]["parameters"]
        wait = next(one for one in parameters if one["name"] == "wait")
        wait["schema"]["maximum"] = settings.api_max_wait
        return document

    return openapi
