"""Bodies of requests: received into a file, and taken apart into operations without decoding a number."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import IO

import msgspec
from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from mdstore import exactjson
from mdstore.errors import InvalidRequest, PayloadTooLarge

_IN_MEMORY = 2**20
#: A JSON body is decoded in one piece, at up to 40 times its size in memory; one operation a line is not.
JSON_LIMIT = 8 * 2**20


class Form(StrEnum):
    """How operations are written down, as a media type."""

    JSON = "application/json"
    NDJSON = "application/x-ndjson"


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    operations: list[msgspec.Raw]


_envelope_decoder = msgspec.json.Decoder(_Envelope)


def limit_of(form: Form, limit: int) -> int:
    """The most bytes that a body of `form` may have, where the front door takes `limit`."""
    return min(limit, JSON_LIMIT) if form is Form.JSON else limit


def form_of(request: Request) -> Form:
    """The form of the body. Raises a 415 where it is none of ours, or compressed."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in set(Form) or coding != "identity":
        detail = f"Send {' or '.join(Form)}, without Content-Encoding."
        raise HTTPException(415, detail, headers={"Accept-Post": ", ".join(Form)})
    return Form(given)


@asynccontextmanager
async def received(request: Request, *, limit: int) -> AsyncIterator[IO[bytes]]:
    """The body, in memory up to 1 MiB, in a temporary file above. Raises `PayloadTooLarge` as soon as that is known."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(int(announced), limit)
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(size, limit)
            if size <= _IN_MEMORY:
                file.write(chunk)
            else:  # a disk's time is not the event loop's
                await run_in_threadpool(file.write, chunk)
        file.seek(0)
        yield file


def operations(file: IO[bytes], form: Form) -> Iterable[bytes]:
    """The JSON of each operation, as sent. Raises `InvalidRequest` where a JSON body is not the right envelope."""
    if form is Form.NDJSON:
        return (line for line in file if line.strip())
    text = file.read()
    try:
        return map(bytes, _envelope_decoder.decode(text).operations)
    except exactjson.DecodeFailure as error:
        raise InvalidRequest(field="body", value=text[:80], expected=f'{{"operations": [...]}} ({error})') from error


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        field="body",
        value=f"{size} bytes or more",
        expected=f"at most {limit} bytes; {Form.NDJSON} may be larger than {Form.JSON}",
    )
