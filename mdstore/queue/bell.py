"""How other threads wake the worker's loop."""

from __future__ import annotations

import os
import threading
from contextlib import suppress


class Bell:
    """A pipe: the loop reads one end, `ring` writes to the other, from any thread."""

    def __init__(self) -> None:
        self._ear, self._hammer = os.pipe()
        os.set_blocking(self._ear, False)
        os.set_blocking(self._hammer, False)
        self._lock = threading.Lock()
        self._is_closed = False

    def fileno(self) -> int:
        """What the loop listens to."""
        return self._ear

    def ring(self) -> None:
        """Wake the loop; nothing once the bell is closed, whose number another file may have by then."""
        with self._lock, suppress(BlockingIOError):  # full: it rings already
            if not self._is_closed:
                os.write(self._hammer, b"!")

    def silence(self) -> None:
        """Hear the next ring, and no former one."""
        with suppress(BlockingIOError):
            os.read(self._ear, 4_096)

    def close(self) -> None:
        """Give back both ends."""
        with self._lock:
            self._is_closed = True
            os.close(self._ear)
            os.close(self._hammer)
