"""Locks of celery-singleton in files: its own are in Redis."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from celery_singleton.backends.base import BaseBackend


class FileLocks(BaseBackend):
    """Keeps each lock in a file, which holds the id of its task."""

    def __init__(self, _url: str, *, directory: str) -> None:
        self._directory = Path(directory)

    def _path(self, lock: str) -> Path:
        return self._directory / sha256(lock.encode()).hexdigest()

    def lock(self, lock: str, task_id: str, expiry: Any = None) -> bool:  # noqa: ARG002
        try:
            with self._path(lock).open("x") as file:
                file.write(task_id)
        except FileExistsError:
            return False
        return True

    def unlock(self, lock: str) -> None:
        self._path(lock).unlink(missing_ok=True)

    def get(self, lock: str) -> str | None:
        try:
            return self._path(lock).read_text() or None
        except FileNotFoundError:
            return None

    def clear(self, key_prefix: str) -> None:
        raise NotImplementedError
