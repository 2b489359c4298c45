"""Bytes in the making that may outgrow the memory: appended to, then read at random."""

from __future__ import annotations

import os
import tempfile
from typing import IO

_BUFFER = 2**20  # bytes of a write; with Python's 8 KB a large request would take thousands


class SpillBuffer:
    """In memory up to `limit` bytes, in a temporary file beyond; its user closes it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._is_flushed = False

    def append(self, data: bytes) -> None:
        """Add `data` at the end."""
        if self._file is not None:
            self._file.write(data)
            self._is_flushed = False
            return
        self._memory += data
        if len(self._memory) > self._limit:
            self._file = tempfile.TemporaryFile(buffering=_BUFFER)  # noqa: SIM115  closed by `close`
            self._file.write(self._memory)
            self._memory = bytearray()

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, exclusive."""
        if self._file is None:
            return bytes(self._memory[start:end])
        if not self._is_flushed:
            self._file.flush()
            self._is_flushed = True
        return os.pread(self._file.fileno(), end - start, start)

    def close(self) -> None:
        """Drop all."""
        if self._file is not None:
            self._file.close()
