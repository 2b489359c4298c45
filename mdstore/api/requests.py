"""Routes that submit requests, wait for them, and read their states and outcomes.

A request's id is `{source}:{idempotency key}`, so no source can use or guess the request id of another source.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Annotated, Any, get_args
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Header, Query, Request
from pydantic.json_schema import SkipJsonSchema
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from mdstore.api import answers, body, models, problems
from mdstore.api.auth import Reader, TheAsyncClient, Writer
from mdstore.async_client import AsyncClient
from mdstore.errors import InvalidRequest, NotFound
from mdstore.model import MAX_REQUEST_ID, check_request_id
from mdstore.store.api_keys import ApiKey, Scope
from mdstore.store.ingestor import new_id
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.outcomes import Only
from mdstore.store.payload_builder import OperationInput

router = APIRouter(tags=["requests"])
#: The most large requests that are encoded at once. Small ones have threads of their own, and so do not wait for large ones.
LARGE_SUBMIT_THREADS = 8

_EXAMPLE = {"op": "upsert", "entity": "airport", "key": "KJFK", "data": {"name": "John F. Kennedy"}}
_BODY = {
    "required": True,
    "description": "The operations: as one JSON object, or as NDJSON with one operation per line. Empty lines are ignored.",
    "content": {
        body.Form.JSON: {
            "schema": {"$ref": "#/components/schemas/Operations"},
            "example": {"operations": [_EXAMPLE]},
        },
        body.Form.NDJSON: {"schema": {"type": "string"}},
    },
}
_LOCATION = {"Location": {"description": "The same path as status_url.", "schema": {"type": "string"}}}

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Makes the call safe to repeat: the same key with the same operations is the same request. It may be in"
        " quotes.",
        json_schema_extra=models.IDEMPOTENCY_KEY_SCHEMA,
    ),
]
OnlyQuery = Annotated[Only | None, Query(json_schema_extra={"anyOf": [{"type": "string", "enum": get_args(Only)}]})]
Cursor = Annotated[str | SkipJsonSchema[None], Query(json_schema_extra={"pattern": r"^(\d{1,9}:\d{1,9})?$"})]
Wait = Annotated[float, Query(ge=0, allow_inf_nan=False, description="Seconds to wait for the final state.")]
NewestWins = Annotated[
    bool,
    Query(
        description="Let the highest sequence of each key win, in whatever order requests are applied: inserts and updates"
        " become upserts, and operations that a sequence alone cannot decide are an error."
    ),
]


@router.post(
    "/v1/requests",
    status_code=202,
    responses={
        200: {"model": models.Finished, "description": "The request has reached its final state", "headers": _LOCATION},
        202: {"model": models.Acknowledgement, "description": "The request is durable", "headers": _LOCATION},
        **problems.documented(400, 401, 403, 408, 409, 413, 415, 422, 429, 503),
    },
    openapi_extra={"requestBody": _BODY},
)
async def submit(
    *,
    request: Request,
    client: TheAsyncClient,
    key: Writer,
    wait: Wait = 0,
    newest_wins: NewestWins = False,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit operations as one request. It is durable when this call succeeds, and not acknowledged when the call fails."""
    settings = client.settings
    request_id = _request_id(key.source, idempotency_key)
    form = body.form_of(request)
    if wait > settings.api_max_wait:
        raise InvalidRequest(field="wait", value=wait, expected=f"at most {settings.api_max_wait} seconds")
    limit = body.limit_of(form, settings.api_max_body_bytes)
    async with (
        request.app.state.admission.slot(key.source) as slot,
        body.received(request, slot=slot, limit=limit, timeout=settings.api_body_timeout) as file,
    ):
        operations = body.operations(file, form, max_record_bytes=settings.max_record_bytes)
        options: Any = {"request_id": request_id, "source": key.source, "newest_wins": newest_wins}
        if slot.size > body.LARGE:
            threads = request.app.state.large_submit_threads
            await anyio.to_thread.run_sync(partial(_submit_large, request, operations, **options), limiter=threads)
        else:
            # A short body is split now, so that its operations are checked without a thread.
            await client.submit(list(operations) if slot.size <= body.SHORT else operations, **options)
    request_id = str(request_id)  # a `NewId` has done its work, and is no JSON
    status_url = request.scope.get("root_path", "") + status_path(request_id)
    headers = {"Location": status_url}
    final = await client.until_final(request_id, seconds=wait, is_gone=request.is_disconnected) if wait else None
    if final is None:
        return answers.json({"request_id": request_id, "status_url": status_url}, 202, headers)
    return answers.json({**final.summary(), "status_url": status_url}, 200, headers)


@router.get(
    "/v1/requests/{request_id:path}/outcomes",
    responses={200: {"model": models.OutcomePage}, **problems.documented(401, 403, 404, 422, 503)},
)
async def outcomes(
    *,
    request: Request,
    client: TheAsyncClient,
    key: Reader,
    request_id: models.RequestIdPath,
    only: OnlyQuery = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
    cursor: Cursor = None,
) -> Response:
    """List what became of each operation, page by page.

    Read on until `cursor` is null: any page may be short, or empty. Operations without an outcome yet are left out.
    """
    if not request.scope["raw_path"].endswith(b"/outcomes"):  # then the path ends with `%2Foutcomes`, a part of the id
        return await state(client, key, f"{request_id}/outcomes")
    found = await _visible_request(client, key, request_id)
    pages = request.app.state.client.store.outcomes
    page, next_cursor = await run_in_threadpool(pages.page, found, only=only, limit=limit, cursor=cursor)
    return answers.json({"outcomes": page, "cursor": next_cursor})


@router.get(
    "/v1/requests/{request_id:path}",
    responses={200: {"model": models.RequestState}, **problems.documented(401, 403, 404, 422, 503)},
)
async def state(client: TheAsyncClient, key: Reader, request_id: models.RequestIdPath) -> Response:
    """Read a request's state with its counts so far. Requests of other sources are visible only with the scope `operate`."""
    found = await _visible_request(client, key, request_id)
    return answers.json(
        {
            **found.summary(),
            "source": found.source,
            "lanes": found.lanes,
            "accepted_at": answers.moment(found.accepted_at),
            "started_at": answers.moment(found.started_at),
            "finished_at": answers.moment(found.finished_at),
            "error": found.error,
        }
    )


def status_path(request_id: str) -> str:
    """Return the path of a request's state. `/` is encoded, so an id that ends with `/outcomes` is not mistaken for a route."""
    return f"/v1/requests/{quote(request_id, safe=':@+=')}"


def _request_id(source: str, idempotency_key: str | None) -> str:
    if idempotency_key is None:
        return new_id(f"{source}:")
    key = _unquoted(idempotency_key)
    try:
        if key:
            return check_request_id(f"{source}:{key}")
    except InvalidRequest:
        pass
    longest = MAX_REQUEST_ID - len(f"{source}:")
    expected = f"1-{longest} of A-Z a-z 0-9 . _ : / @ + = -, without empty or dotted parts"
    raise InvalidRequest(field="Idempotency-Key", value=idempotency_key, expected=expected)


def _unquoted(key: str) -> str:
    """Return the content of a key in quotes, as in the IETF's draft of the header, or the key as it stands."""
    return key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key


def _submit_large(request: Request, operations: Generator[OperationInput, None, None], **options: Any) -> None:
    # Closing the generator releases its lock on large bodies, however `accept` ends.
    with closing(operations):
        request.app.state.client.ingest.accept(operations, **options)


async def _visible_request(client: AsyncClient, key: ApiKey, request_id: str) -> RequestStatus:
    found = await client.status(request_id)
    if found.source != key.source and Scope.OPERATE not in key.scopes:
        raise NotFound("request", request_id)
    return found
