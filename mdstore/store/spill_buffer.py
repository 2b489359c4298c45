"""A byte buffer that moves from memory to a temporary file when it grows: append to it, then read any part of it."""

from __future__ import annotations

import os
import tempfile
from typing import IO

_BUFFER = 2**20  # bytes per write to the file; with Python's 8 KB, a large request would take thousands of writes


class SpillBuffer:
    """Holds up to `limit` bytes in memory, and more in a temporary file. Its user must close it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._is_flushed = False

    def append(self, data: bytes) -> None:
        """Append `data`."""
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
        """Return bytes `start` to `end` (exclusive)."""
        if self._file is None:
            return bytes(self._memory[start:end])
        if not self._is_flushed:
            self._file.flush()
            self._is_flushed = True
        return os.pread(self._file.fileno(), end - start, start)

    def close(self) -> None:
        """Discard the content."""
        if self._file is not None:
            self._file.close()
