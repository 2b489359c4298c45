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

    def fileno(self) -> int:
        """Return the end that the loop reads."""
        return self._read_end

    def wake(self) -> None:
        """Wake the loop. Do nothing once the pipe is closed, because another file may have its number by then."""
        with self._lock, suppress(BlockingIOError):  # a full pipe wakes the loop anyway
            if not self._is_closed:
                os.write(self._write_end, b"!")

    def clear(self) -> None:
        """Discard past wake-ups, so that only a new one wakes the loop."""
        with suppress(BlockingIOError):
            os.read(self._read_end, 4_096)

    def close(self) -> None:
        """Close both ends."""
        with self._lock:
            self._is_closed = True
            os.close(self._read_end)
            os.close(self._write_end)
