"""Request bodies: receive them into a file, and split them into operations without decoding numbers."""

from __future__ import annotations

import codecs
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

_IN_MEMORY = 2**20  # bytes
#: The most bytes of a JSON body. Decoding it as a whole takes up to 40 times its size in memory. NDJSON is decoded by line.
JSON_LIMIT = 8 * 2**20


class Form(StrEnum):
    """The formats of a body, as media types."""

    JSON = "application/json"
    NDJSON = "application/x-ndjson"


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    operations: list[msgspec.Raw]


_envelope_decoder = msgspec.json.Decoder(_Envelope)


def limit_of(form: Form, limit: int) -> int:
    """Return the most bytes that a body in `form` may have; `limit` is the API's limit for every body."""
    return min(limit, JSON_LIMIT) if form is Form.JSON else limit


def form_of(request: Request) -> Form:
    """Return the body's format. Raises an `HTTPException` with status 415 if it is unknown, or the body is compressed."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in set(Form) or coding != "identity":
        detail = f"Send {' or '.join(Form)}, without Content-Encoding."
        raise HTTPException(415, detail, headers={"Accept-Post": ", ".join(Form)})
    return Form(given)


@asynccontextmanager
async def received(request: Request, *, limit: int) -> AsyncIterator[IO[bytes]]:
    """Receive the body: up to 1 MiB into memory, more into a temporary file.

    Raises `PayloadTooLarge` as soon as the body is known to exceed `limit` bytes.
    """
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
            else:  # a slow disk must not block the event loop
                await run_in_threadpool(file.write, chunk)
        file.seek(0)
        yield file


def operations(file: IO[bytes], form: Form) -> Iterable[bytes]:
    """Return the JSON of each operation as sent.

    Raises an `HTTPException` with status 400 if a JSON body is malformed, and `InvalidRequest` if it is not
    `{"operations": [...]}`.
    """
    _skip_byte_order_mark(file)
    if form is Form.NDJSON:
        return (line for line in file if line.strip())
    text = file.read()
    try:
        text.decode()  # the decoder below does not look into the operations
        return map(bytes, _envelope_decoder.decode(text).operations)
    except msgspec.ValidationError as error:
        shown = text[:80].decode(errors="replace")
        raise InvalidRequest(field="body", value=shown, expected=f'{{"operations": [...]}} ({error})') from error
    except exactjson.DecodeFailure as error:
        raise HTTPException(400, f"The body is not JSON: {exactjson.explain(text, error)}.") from error


def _skip_byte_order_mark(file: IO[bytes]) -> None:
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        field="body",
        value=f"{size} bytes or more",
        expected=f"at most {limit} bytes; {Form.NDJSON} may be larger than {Form.JSON}",
    )
