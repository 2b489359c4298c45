"""Request bodies: receive them into a file, and split them into operations without decoding numbers."""

from __future__ import annotations

import asyncio
import codecs
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, nullcontext
from enum import StrEnum
from typing import IO

import msgspec
from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from mdstore import exactjson
from mdstore.api.admission import Slot
from mdstore.errors import InvalidRequest, PayloadTooLarge
from mdstore.store.lines import read_lines
from mdstore.store.payload_builder import OperationInput

_IN_MEMORY = 2**18  # bytes
_SLOWEST = 10 * 2**10  # bytes a second: a body that comes more slowly is refused
SHORT = 2**14  # bytes of a body: it is split within a millisecond
LARGE = 2**18  # bytes of a body, or of one of its lines
_large = threading.Lock()  # held while a large line or JSON body is decoded
#: The most bytes of a JSON body. Decoding it as a whole takes up to 40 times its size in memory. NDJSON is decoded by line.
JSON_LIMIT = 8 * 2**20
#: The most values in a JSON body: each may be an operation, and all operations are listed before the first is decoded.
_JSON_VALUES = 1_000_000


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
async def received(request: Request, *, slot: Slot, limit: int, timeout: float) -> AsyncIterator[IO[bytes]]:
    """Receive the body: up to 256 KiB into memory, more into a temporary file.

    Raises `PayloadTooLarge` as soon as the body is known to exceed `limit` bytes, and an `HTTPException` if its `slot` has no
    room for it, or if it takes more than `timeout` seconds and one more for each 10 KiB.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(int(announced), limit)
    slot.hold(int(announced) if announced.isdecimal() else 0)
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
        await _receive(request, file, slot, limit, timeout)
        file.seek(0)
        yield file


async def _receive(request: Request, file: IO[bytes], slot: Slot, limit: int, timeout: float) -> None:
    size, more = 0, True
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        async with asyncio.timeout_at(deadline) as patience:
            while more:
                chunk, more = await _next_chunk(request)
                size += len(chunk)
                if size > limit:
                    raise _too_large(size, limit)
                slot.hold(size)
                if size <= _IN_MEMORY:
                    file.write(chunk)
                else:  # a slow disk must not block the event loop, nor count as the caller's slowness
                    patience.reschedule(None)
                    began = time.monotonic()
                    await run_in_threadpool(file.write, chunk)
                    deadline += time.monotonic() - began
                if more:
                    patience.reschedule(deadline + size / _SLOWEST)
    except TimeoutError:
        detail = "The body came too slowly. Send the call again."
        raise HTTPException(408, detail, headers={"Connection": "close"}) from None


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    """Receive the next part of the body. Return it, and whether there may be more."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def operations(file: IO[bytes], form: Form, *, max_record_bytes: int) -> Generator[OperationInput, None, None]:
    """Yield the JSON of each operation as sent.

    Raises an `HTTPException` with status 400 if a JSON body is malformed, and `InvalidRequest` if it is not
    `{"operations": [...]}`, or if decoding it would take too long.

    Only one thread at a time works on a large line or JSON body, because decoding it takes many times its size in memory.
    """
    if form is Form.NDJSON:
        for _, line in read_lines(file, max_record_bytes=max_record_bytes):
            if isinstance(line, bytes) and len(line) > LARGE:
                with _large:
                    yield line
            else:
                yield line
        return
    text = file.read().removeprefix(codecs.BOM_UTF8)
    with _large if len(text) > LARGE else nullcontext():
        yield from map(bytes, _split(text))


def _split(text: bytes) -> list[msgspec.Raw]:
    try:
        exactjson.check_cost(text, most_values=_JSON_VALUES)
    except ValueError as error:
        raise _invalid(text, error) from error
    try:
        text.decode()  # the decoder below does not look into the operations
        return _envelope_decoder.decode(text).operations
    except msgspec.ValidationError as error:
        raise _invalid(text, error) from error
    except exactjson.DecodeFailure as error:
        raise HTTPException(400, f"The body is not JSON: {exactjson.explain(text, error)}.") from error


def _invalid(text: bytes, error: Exception) -> InvalidRequest:
    shown = text[:80].decode(errors="replace")
    return InvalidRequest(field="body", value=shown, expected=f'{{"operations": [...]}} ({error})')


def _too_large(size: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        field="body",
        value=f"{size} bytes or more",
        expected=f"at most {limit} bytes; {Form.NDJSON} may be larger than {Form.JSON}",
    )
