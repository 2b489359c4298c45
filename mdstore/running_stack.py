"""Tells commands in other shells where the stack of `mdstore up` listens.

`mdstore up` writes its endpoint to a per-user file, and holds a lock on the file while it runs. A file without a lock is
left over from a stack that has ended, however it ended.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def announced(url: str) -> Iterator[bool]:
    """Announce the endpoint `url` while the block runs. Yield False if another stack of this user is announced already."""
    # Do not follow links: other users may write to the directory for temporary files.
    descriptor = os.open(_path(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+", encoding="ascii") as file:
        if os.fstat(descriptor).st_uid != os.geteuid() or not _locked(descriptor, fcntl.LOCK_EX):
            yield False
            return
        file.truncate()
        file.write(url)
        file.flush()
        yield True


def announced_url() -> str | None:
    """Return the endpoint of this user's running stack, or None."""
    try:
        descriptor = os.open(_path(), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, encoding="ascii") as file:
        if os.fstat(descriptor).st_uid != os.geteuid() or _locked(descriptor, fcntl.LOCK_SH):
            return None
        return file.read() or None


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path() -> Path:
    directory = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(directory) / f"mdstore-{os.geteuid()}.endpoint"
