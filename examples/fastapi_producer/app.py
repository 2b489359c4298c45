"""A service that accepts price lists over HTTP and submits them to mdstore: `uvicorn fastapi_producer.app:app`.

The routes are coroutines, so the service uses `AsyncClient`: the event loop stays free while `submit` waits for S3 and SQS.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from mdstore import (
    AsyncClient,
    InvalidOperations,
    InvalidRequest,
    NotFound,
    Operation,
    RequestConflict,
    State,
    Unavailable,
)

SOURCE = "price-service"
logger = logging.getLogger(__name__)
client = AsyncClient()


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Use the client while the service runs. It builds the AWS clients now, not while the first caller waits."""
    async with client:
        yield


app = FastAPI(title="Prices", lifespan=lifespan)


class Price(BaseModel):
    """The price of one article."""

    article: str
    cents: int


class PriceList(BaseModel):
    """The body that a caller posts."""

    prices: list[Price]


class Accepted(BaseModel):
    """The answer for a durable price list."""

    request_id: str
    status_url: str


class Status(BaseModel):
    """The state of a price list, and its counts so far."""

    request_id: str
    state: State
    applied: int
    refused: int
    failed: int
    error: str


@app.post("/price-lists", status_code=202)
async def post_price_list(
    price_list: PriceList, idempotency_key: Annotated[str, Header()], request: Request, response: Response
) -> Accepted:
    """Accept a price list. A repeat with the same key and content gets the same answer and changes nothing."""
    operations = (
        Operation(op="upsert", entity="price", key=price.article, data={"cents": price.cents})
        for price in price_list.prices
    )
    submission = await client.submit(operations, request_id=f"{SOURCE}:{idempotency_key}", source=SOURCE)
    status_url = str(request.url_for("get_price_list", request_id=submission.request_id))
    response.headers["Location"] = status_url
    return Accepted(request_id=submission.request_id, status_url=status_url)


@app.get("/price-lists/{request_id:path}")
async def get_price_list(request_id: str) -> Status:
    """Return a price list's state and the counts so far."""
    try:
        found = await client.status(request_id)
    except NotFound as error:
        raise HTTPException(404, str(error)) from error
    return Status(**found.summary(), error=found.error)


@app.exception_handler(InvalidRequest)
async def on_invalid(_: Request, error: InvalidRequest) -> JSONResponse:
    """Answer 422 with what is wrong; nothing was stored."""
    if isinstance(error, InvalidOperations):
        errors = [{"index": one.index, "field": one.field, "reason": one.reason} for one in error.problems]
    else:
        errors = [{"index": None, "field": error.field, "reason": f"expected {error.expected}"}]
    return JSONResponse({"detail": errors}, 422)


@app.exception_handler(RequestConflict)
async def on_conflict(_: Request, error: RequestConflict) -> JSONResponse:
    """Answer 409: the key was used for another price list."""
    return JSONResponse({"detail": str(error)}, 409)


@app.exception_handler(Unavailable)
async def on_unavailable(_: Request, error: Unavailable) -> JSONResponse:
    """Answer 503 and ask for the same call again, which is harmless with the same key. Only the log has the cause."""
    logger.error("AWS did not answer", exc_info=error)
    return JSONResponse({"detail": "Not accepted. Send the same again."}, 503, {"Retry-After": "5"})
