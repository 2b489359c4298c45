"""Reads lines of JSON from a stream, without ever holding a line that is longer than an operation may be."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from itertools import count
from typing import IO

from mdstore.store.validation import LineTooLong

_MARGIN = 2**16  # bytes of a line beyond the longest operation, for white space
_PIECE = 2**16  # bytes of a line that is skipped
_GROUP, _ESCAPE = b'"group"', b"\\u"  # an escape may hide the name of the field


def read_lines(stream: IO[bytes], *, max_record_bytes: int) -> Iterator[tuple[int, bytes | LineTooLong]]:
    """Yield each line that is not blank, with its number and without white space around it. The first may begin with a BOM.

    A line much longer than `max_record_bytes` is skipped, and an error is yielded in its place.
    """
    limit = max_record_bytes + _MARGIN
    for number in count(1):
        line = stream.readline(limit)
        if not line:
            return
        if len(line) == limit and not line.endswith(b"\n"):
            skipped = _skipped(stream, line, max_record_bytes)
            if skipped is not None:
                yield number, skipped
            continue
        stripped = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
        if stripped:
            yield number, stripped


def _skipped(stream: IO[bytes], start: bytes, limit: int) -> LineTooLong | None:
    """Read a line to its end, and return an error with its size and its digest, or None if the line is blank."""
    digest = hashlib.sha256()
    size, is_blank, may_name_group = 0, True, False
    piece, before = start.lstrip(), b""
    while True:
        text = piece.rstrip() if piece.endswith(b"\n") else piece
        digest.update(text)
        size += len(text)
        is_blank = is_blank and not text.strip()
        joined = before + text  # a word may be cut by the end of a piece
        may_name_group = may_name_group or _GROUP in joined or _ESCAPE in joined
        before = text[-len(_GROUP) :]
        if piece.endswith(b"\n") or not (piece := stream.readline(_PIECE)):
            break
    if is_blank:
        return None
    return LineTooLong(size, limit=limit, digest=digest.digest(), may_name_group=may_name_group)
