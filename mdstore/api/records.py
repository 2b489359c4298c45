"""Routes that read records with strong consistency, one by one or page by page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from mdstore.api import answers, models, problems
from mdstore.api.auth import Reader, TheAsyncClient, TheClient
from mdstore.errors import InvalidRequest
from mdstore.store.records import Record
from mdstore.store.validation import FieldError, check_entity, check_key

router = APIRouter(tags=["records"])
_ETAG = {"ETag": {"description": "The record's version, in quotes.", "schema": {"type": "string"}}}


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    S: str


class _Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record's primary key in DynamoDB JSON. It may belong to another entity, because a listing scans the whole table."""

    pk: _Text


_position_decoder = msgspec.json.Decoder(_Position)


@router.get(
    "/v1/records/{entity}/{key:path}",
    responses={
        200: {"model": models.RecordModel, "headers": _ETAG},
        304: {"description": "The record still has the version given in If-None-Match", "headers": _ETAG},
        **problems.documented(401, 403, 404, 422, 503),
    },
)
async def record(
    client: TheAsyncClient,
    _: Reader,
    entity: models.EntityPath,
    key: models.KeyPath,
    if_none_match: Annotated[list[str] | SkipJsonSchema[None], Header()] = None,
) -> Response:
    """Read one record."""
    check_entity(entity)
    check_key(key)
    found = await client.get(entity, key)
    headers = {"ETag": f'"{found.version}"'}
    if _matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return answers.json(_record_json(found), headers=headers)


@router.get(
    "/v1/records/{entity}",
    responses={200: {"model": models.RecordPage}, **problems.documented(401, 403, 422, 503)},
)
def records(
    client: TheClient,
    _: Reader,
    entity: models.EntityPath,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    cursor: Annotated[str | SkipJsonSchema[None], Query(description="The cursor of a previous page.")] = None,
) -> Response:
    """List an entity's records page by page, in no particular order.

    A listing reads the records of all entities. One page reads at most 4,000 of them, or 4 MB, so a page may be short, or empty
    if the entity is rare. `read_limit_reached` says so. Read on until `cursor` is null.
    """
    check_entity(entity)
    page, next_position = client.store.records.page(entity, limit=limit, cursor=_position(cursor) if cursor else None)
    return answers.json(
        {
            "records": [_record_json(found) for found in page],
            "cursor": _cursor(next_position),
            "read_limit_reached": next_position is not None and len(page) < limit,
        }
    )


def _record_json(found: Record) -> dict[str, Any]:
    sequence = {} if found.sequence is None else {"sequence": found.sequence}
    return {
        "entity": found.entity,
        "key": found.key,
        "version": found.version,
        **sequence,
        "data": found.data,
        "updated_at": answers.moment(found.updated_at),
        "updated_by": found.updated_by,
    }


def _matches(if_none_match: Sequence[str] | None, etag: str) -> bool:
    """Return whether the header's lines contain `etag`, by the weak comparison that RFC 9110 (13.1.2) requires."""
    names = {name.strip().removeprefix("W/") for name in ",".join(if_none_match or ()).split(",")}
    return etag in names or names == {"*"}


def _cursor(position: Any) -> str | None:
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=") if position else None


def _position(cursor: str) -> dict[str, Any]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        position = _position_decoder.decode(text)
        entity, _, key = position.pk.S.partition("#")
        check_entity(entity)
        check_key(key)
    except (binascii.Error, ValueError, RecursionError, FieldError) as error:
        raise InvalidRequest(field="cursor", value=cursor, expected="the cursor of a previous page") from error
    return {"pk": {"S": position.pk.S}}
