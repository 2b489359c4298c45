"""How other threads wake the worker's loop."""

from __future__ import annotations

import os
import threading
from contextlib import suppress


class WakeupPipe:
    """A pipe: the loop reads one end, `wake` writes to the other, from any thread."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        self._lock = threading.Lock()
        self._is_closed = False

    def fileno(self) -> int:
        """What the loop listens to."""
        return self._read_end

    def wake(self) -> None:
        """Wake the loop; nothing once the bell is closed, whose number another file may have by then."""
        with self._lock, suppress(BlockingIOError):  # full: it rings already
            if not self._is_closed:
                os.write(self._write_end, b"!")

    def clear(self) -> None:
        """Hear the next ring, and no former one."""
        with suppress(BlockingIOError):
            os.read(self._read_end, 4_096)

    def close(self) -> None:
        """Give back both ends."""
        with self._lock:
            self._is_closed = True
            os.close(self._read_end)
            os.close(self._write_end)
