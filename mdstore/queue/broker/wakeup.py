"""Wake the worker's event loop from other threads."""

from __future__ import annotations

import os
import threading
from contextlib import suppress


class WakeupPipe:
    """Wraps a pipe: the loop reads one end, and any thread writes to the other end with `wake`."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_awake = False  # a wake-up is in the pipe

    def fileno(self) -> int:
        """Return the end that the loop reads."""
        return self._read_end

    def wake(self) -> None:
        """Wake the loop. Do nothing once the pipe is closed, because another file may have its number by then."""
        with self._lock:
            if not (self._is_closed or self._is_awake):
                os.write(self._write_end, b"!")
                self._is_awake = True

    def clear(self) -> None:
        """Discard past wake-ups, so that only a new one wakes the loop."""
        with self._lock, suppress(BlockingIOError):
            self._is_awake = False
            os.read(self._read_end, 1)

    def close(self) -> None:
        """Close both ends."""
        with self._lock:
            self._is_closed = True
            os.close(self._read_end)
            os.close(self._write_end)
