"""Builds the sections of a payload, and the payload from its header and its sections."""

from __future__ import annotations

import hashlib
import tempfile
from functools import cached_property
from typing import IO

import zstandard

from mdstore import exactjson
from mdstore.compression import compressor
from mdstore.store.payload import MAGIC, Encoded, Header, Section

SPILL_BEYOND = 4 * 2**20
_PIECE = 2**18  # bytes of lines that are compressed in one call


class SectionBuilder:
    """Compresses the lines of one section."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data = bytearray()
        self._is_finished = False
        self.raw = 0
        self.count = 0

    def add(self, line: bytes) -> None:
        """Add one line, including its newline."""
        self._pending += line
        self.raw += len(line)
        self.count += 1
        if len(self._pending) >= _PIECE:
            self._compress()

    def write_to(self, body: IO[bytes]) -> Section:
        """Append the section to `body` and return its entry for the header. No line may be added after that."""
        if not self._is_finished:
            self._compress()
            self._data += self._zstd.flush()
            self._is_finished = True
        digest = hashlib.sha256(self._data).hexdigest()
        section = Section(offset=body.tell(), length=len(self._data), raw=self.raw, count=self.count, digest=digest)
        body.write(self._data)
        return section

    def lines(self) -> bytes:
        """Return the lines, as long as they are so few that none is compressed yet."""
        if self._data:
            raise ValueError(f"{self.count} lines of {self.raw} bytes: expected at most {_PIECE} bytes")
        return bytes(self._pending)

    @cached_property
    def _zstd(self) -> zstandard.ZstdCompressionObj:
        return compressor()

    def _compress(self) -> None:
        self._data += self._zstd.compress(self._pending)
        self._pending.clear()


def spill_file() -> IO[bytes]:
    """Make a file that stays in memory while it is small. Its user must close it."""
    return tempfile.SpooledTemporaryFile(max_size=SPILL_BEYOND)


def assembled(header: Header, sections: IO[bytes]) -> Encoded:
    """Return the payload that consists of a header and its sections. Its user must close the body."""
    text = exactjson.dumps(header)
    body = spill_file()
    body.write(MAGIC + len(text).to_bytes(4, "big") + text)
    sections.seek(0)
    while chunk := sections.read(2**20):
        body.write(chunk)
    body.seek(0)
    return Encoded(header=header, digest=hashlib.sha256(text).hexdigest(), body=body)
