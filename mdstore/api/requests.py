"""Requests: submitted, waited for, looked up.

A request's id is `{source}:{idempotency key}`, so no source can take or guess its way into another's.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import IO, Annotated
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import Response

from mdstore.api import answers, body, models, problems
from mdstore.api.auth import Reader, TheClient, Writer
from mdstore.client import Client
from mdstore.errors import DeploymentBroken, InvalidRequest, NotFound, Unavailable
from mdstore.model import FINAL_STATES, check_request_id
from mdstore.store import ledger
from mdstore.store.api_keys import ApiKey, Scope
from mdstore.store.outcomes import Only

router = APIRouter(tags=["requests"])
#: Requests that are encoded at a time: each takes memory for its largest operation, or its JSON body.
SUBMIT_THREADS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25  # seconds between looks at a request that is waited for

_EXAMPLE = {"op": "upsert", "entity": "airport", "key": "KJFK", "data": {"name": "John F. Kennedy"}}
_BODY = {
    "required": True,
    "description": "The operations: an object, or one operation a line. Empty lines are not counted.",
    "content": {
        body.Form.JSON: {
            "schema": {"$ref": "#/components/schemas/Operations"},
            "example": {"operations": [_EXAMPLE]},
        },
        body.Form.NDJSON: {"schema": {"type": "string"}},
    },
}
_LOCATION = {"Location": {"description": "The status_url.", "schema": {"type": "string"}}}

RequestId = Annotated[str, Path(description="May hold `/`, plain or as `%2F`.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Makes repeating the call harmless: the same key and operations get the same answer.",
    ),
]
Wait = Annotated[float, Query(ge=0, allow_inf_nan=False, description="Seconds to wait for the final state.")]


@router.post(
    "/v1/requests",
    status_code=202,
    responses={
        200: {"model": models.Finished, "description": "Waited for, and in its final state", "headers": _LOCATION},
        202: {"model": models.Acknowledgement, "description": "Durable", "headers": _LOCATION},
        **problems.documented(401, 403, 409, 413, 415, 422, 503),
    },
    openapi_extra={"requestBody": _BODY},
)
async def submit(
    request: Request, client: TheClient, key: Writer, wait: Wait = 0, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit operations. They are durable when this answers, and nothing was stored when it answers with a problem."""
    settings = client.settings
    request_id = _request_id(key.source, idempotency_key)
    form = body.form_of(request)
    if wait > settings.api_max_wait:
        raise InvalidRequest(field="wait", value=wait, expected=f"at most {settings.api_max_wait} seconds")
    async with body.received(request, limit=body.limit_of(form, settings.api_max_body_bytes)) as spool:
        submit_one = partial(_submit, client, spool, form, request_id, key.source)
        await anyio.to_thread.run_sync(submit_one, limiter=request.app.state.submit_threads)
    place = request.scope.get("root_path", "") + status_path(request_id)
    headers = {"Location": place}
    final = await _final(request, client, request_id, wait) if wait else None
    if final is None:
        return answers.json({"request_id": request_id, "status_url": place}, 202, headers)
    return answers.json({**final.summary(), "status_url": place}, 200, headers)


@router.get(
    "/v1/requests/{request_id:path}/outcomes",
    responses={200: {"model": models.OutcomePage}, **problems.documented(401, 403, 404, 422, 503)},
)
def outcomes(
    *,
    request: Request,
    client: TheClient,
    key: Reader,
    request_id: RequestId,
    only: Only | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1_000,
    cursor: str | None = None,
) -> Response:
    """What became of each operation, as long as `cursor` is not null: a page may be short, or empty.

    An operation that has no outcome as yet is left out.
    """
    if not request.scope["raw_path"].endswith(b"/outcomes"):  # `%2Foutcomes` is the end of an id
        return state(client, key, f"{request_id}/outcomes")
    found = _visible(client, key, request_id)
    page, following = client.store.outcomes.page(found, only=only, limit=limit, cursor=cursor)
    return answers.json({"outcomes": page, "cursor": following})


@router.get(
    "/v1/requests/{request_id:path}",
    responses={200: {"model": models.RequestState}, **problems.documented(401, 403, 404, 422, 503)},
)
def state(client: TheClient, key: Reader, request_id: RequestId) -> Response:
    """A request's state, with the counts so far. Requests of other sources are seen with the scope `operate` only."""
    found = _visible(client, key, request_id)
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
    """The path of a request's state. `/` is encoded, so an id's own end is never taken for a part of the path."""
    return f"/v1/requests/{quote(request_id, safe=':@+=')}"


def _request_id(source: str, idempotency_key: str | None) -> str:
    if idempotency_key is None:
        return f"{source}:{uuid.uuid4()}"
    try:
        if idempotency_key:
            return check_request_id(f"{source}:{idempotency_key}")
    except InvalidRequest:
        pass
    longest = 199 - len(source)
    expected = f"1-{longest} of A-Z a-z 0-9 . _ : / @ + = -, without empty or dotted parts"
    raise InvalidRequest(field="Idempotency-Key", value=idempotency_key, expected=expected)


def _submit(client: Client, spool: IO[bytes], form: body.Form, request_id: str, source: str) -> None:
    client.ingest.accept(body.operations(spool, form), request_id=request_id, source=source)


async def _final(request: Request, client: Client, request_id: str, wait: float) -> ledger.RequestStatus | None:
    """The request in its final state, or None after `wait` seconds, or when nobody listens any more."""
    pause = _FIRST_PAUSE
    with anyio.move_on_after(wait):
        while not await request.is_disconnected():
            found = await anyio.to_thread.run_sync(_if_final, client, request_id, abandon_on_cancel=True)
            if found is not None:
                return found
            await anyio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.5)
    return None


def _if_final(client: Client, request_id: str) -> ledger.RequestStatus | None:
    # The request is durable: failing to see it now is no reason to say otherwise.
    try:
        found = client.store.ledger.get(request_id)
    except (NotFound, Unavailable, DeploymentBroken):
        return None
    return found if found.state in FINAL_STATES else None


def _visible(client: Client, key: ApiKey, request_id: str) -> ledger.RequestStatus:
    found = client.status(request_id)
    if found.source != key.source and Scope.OPERATE not in key.scopes:
        raise NotFound("request", request_id)
    return found
