"""The embedded AWS with durable state: ministack, and a snapshot of its state every few seconds.

ministack writes S3 objects to disk at once, but everything else only on a clean stop. This module runs the same server. While
there are changes, a forked child writes the state of all services as it was at the fork, so that requests wait for the fork
only. A snapshot is a directory that gets its name when it is complete. A start reads the newest one.

Run it as a process: `python -m mdstore.local.snapshots DIRECTORY`, with ministack's own environment variables.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from mdstore.local.fast_ministack import speed_up

logger = logging.getLogger(__name__)

#: The shortest pause between two snapshots, in seconds, and in units of the last one's duration: at most a third is writing.
_PAUSE, _PAUSE_FACTOR = 2.0, 2
#: Prefixes of actions that change nothing that must survive. If a receive is lost, its message is only visible again sooner.
_READS = ("Get", "BatchGet", "TransactGet", "Query", "Scan", "Describe", "List", "ReceiveMessage", "ChangeMessage")
_UNFINISHED = ".new"

Scope = MutableMapping[str, Any]
Callback = Callable[..., Awaitable[Any]]


def newest(directory: Path) -> Path | None:
    """Return the newest complete snapshot in a directory."""
    return max((path for path in directory.glob("*") if path.name.isdecimal()), key=_number, default=None)


def _number(path: Path) -> int:
    return int(path.name.removesuffix(_UNFINISHED))


class Snapshots:
    """ministack's ASGI application, which saves its state in `directory` while it serves."""

    def __init__(self, server: Any, directory: Path) -> None:
        self._server = server
        self._app: Callback = server.app
        self._directory = directory
        self._has_changed = False

    async def __call__(self, scope: Scope, receive: Callback, send: Callback) -> None:
        """Serve one request, or the server's life from start to stop."""
        if scope["type"] == "lifespan":
            saving = asyncio.create_task(self._save_regularly())
            try:
                await self._app(scope, receive, send)
            finally:
                saving.cancel()
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._has_changed = self._has_changed or not _is_read(scope)

    async def _save_regularly(self) -> None:
        pause = _PAUSE
        while True:
            await asyncio.sleep(pause)
            if not self._has_changed:
                continue
            self._has_changed = False
            began = time.monotonic()
            try:
                child = self._fork_writer()
            except OSError:  # no memory, or too many processes
                logger.exception("no snapshot could be begun in %s; the one before stays", self._directory)
                self._has_changed = True
                continue
            _, status = await asyncio.get_running_loop().run_in_executor(None, os.waitpid, child, 0)
            self._has_changed = self._has_changed or status != 0
            pause = max(_PAUSE, _PAUSE_FACTOR * (time.monotonic() - began))

    def save_at_stop(self, _: object) -> None:
        """Save the state when the server stops."""
        os.waitpid(self._fork_writer(), 0)

    def _fork_writer(self) -> int:
        """Fork a child that writes a snapshot and exits; return its process id.

        ministack handles requests in this thread, so none is half done at the fork. Only its removal of expired items has a
        thread of its own.
        """
        parent = os.getpid()
        with self._server._get_module("dynamodb")._lock:
            child = os.fork()
        if child == 0:
            code = 1
            try:
                _become_writer()
                self._write(parent)
                code = 0
            except BaseException:
                logger.exception("a snapshot in %s failed; the one before stays", self._directory)
            finally:
                os._exit(code)
        return child

    def _write(self, parent: int) -> None:
        """Write a snapshot, and remove all others, unless the parent process has ended: another may use the directory now."""
        from ministack.core import persistence  # noqa: PLC0415  its settings are read when it is imported

        others = [path for path in self._directory.glob("*") if path.name.removesuffix(_UNFINISHED).isdecimal()]
        name = str(max(map(_number, others), default=0) + 1)
        unfinished = self._directory / (name + _UNFINISHED)
        unfinished.mkdir(parents=True)
        for service, get_state in self._server._build_persistence_save_dict().items():
            state = get_state()
            if state is not None:
                wrapped = {"__ministack_format__": persistence._state_format_version(service), "payload": state}
                text = json.dumps(wrapped, default=persistence._json_default)
                (unfinished / f"{service}.json").write_text(text, encoding="utf-8")
        if os.getppid() != parent:
            return
        unfinished.rename(self._directory / name)
        for path in others:  # at a stop, another child may still be writing; the next snapshot removes what is left
            shutil.rmtree(path, ignore_errors=True)


def _become_writer() -> None:
    """Prepare a forked child for writing: it shares no socket with its parent, and leaves the processor to others."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.nice(5)
    gc.disable()
    # Services return deep copies of their state. This process is a copy already.
    copy.deepcopy = lambda value, _memo=None: value  # type: ignore[assignment,misc]


def _is_read(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
        return True
    target: str = dict(scope["headers"]).get(b"x-amz-target", b"").decode("latin-1")
    return target.rpartition(".")[2].startswith(_READS)


def main(directory: Path) -> None:
    """Serve until the process is told to stop."""
    # Python warns of a fork in a process with threads. The child only reads objects, writes files, and ends.
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    directory.mkdir(parents=True, exist_ok=True)
    # Earlier releases kept their state in a directory `state` beside the snapshots.
    os.environ |= {"PERSIST_STATE": "1", "STATE_DIR": str(newest(directory) or directory.with_name("state"))}
    from ministack import app as server  # noqa: PLC0415  its settings are read when it is imported

    speed_up()
    snapshots = Snapshots(server, directory)
    server.app = snapshots
    server.save_all = snapshots.save_at_stop
    server.main()


if __name__ == "__main__":
    main(Path(sys.argv.pop()))  # ministack reads the other arguments
