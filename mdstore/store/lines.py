"""Reads lines of JSON from a stream, without ever holding a line that is much longer than an operation may be."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from typing import IO

from mdstore.store.validation import LineTooLong

_PIECE = 2**18  # bytes read at once, and so the most by which a line that is kept may exceed the limit
_GROUP, _ESCAPE = b'"group"', b"\\u"  # an escape may hide the name of the field


def read_lines(stream: IO[bytes], *, max_record_bytes: int) -> Iterator[tuple[int, bytes | LineTooLong]]:
    """Yield each line that is not blank, with its number and without white space around it. The first may begin with a BOM.

    A line much longer than `max_record_bytes` is skipped, and an error is yielded in its place.
    """
    number, size = 0, 0
    held: list[bytes] = []  # the pieces of a line whose end has not been read yet, of this size
    piece = stream.read(_PIECE).removeprefix(codecs.BOM_UTF8)
    while piece:
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = b"".join([*held, lines[0]])
            held, size = [], 0
        for number, line in enumerate(lines, number + 1):  # noqa: B020  continues the count
            if stripped := line.strip():
                yield number, stripped
        held.append(rest)
        size += len(rest)
        piece = b""
        if size > max_record_bytes:
            number += 1
            skipped, piece = _skipped(stream, b"".join(held), max_record_bytes)
            held, size = [], 0
            if skipped is not None:
                yield number, skipped
        piece = piece or stream.read(_PIECE)
    if stripped := b"".join(held).strip():
        yield number + 1, stripped


def _skipped(stream: IO[bytes], start: bytes, limit: int) -> tuple[LineTooLong | None, bytes]:
    """Read to the end of a line. Return an error with its size and its digest, or None if it is blank, and what follows it."""
    digest = hashlib.sha256()
    size, is_blank, may_name_group = 0, True, False
    piece, before = start.lstrip(), b""
    while True:
        text, end, rest = piece.partition(b"\n")
        text = text.rstrip() if end else text
        digest.update(text)
        size += len(text)
        is_blank = is_blank and not text.strip()
        joined = before + text  # a word may be cut by the end of a piece
        may_name_group = may_name_group or _GROUP in joined or _ESCAPE in joined
        before = text[-len(_GROUP) :]
        if end or not (piece := stream.read(_PIECE)):
            break
    if is_blank:
        return None, rest
    return LineTooLong(size, limit=limit, digest=digest.digest(), may_name_group=may_name_group), rest
