"""Submits small requests from coroutines to the group commit, whose calls to AWS block threads: a few for all requests."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from mdstore.store.group_commit import GroupCommit
from mdstore.store.ingestor import Accepted, BuiltRequest

logger = logging.getLogger(__name__)
#: The most commits that are under way: while one stores its payload and sends its message, the next ones write their notes.
_COMMITS = 4


class Commits:
    """Runs commits while requests wait for one. It belongs to the event loop in which it is used."""

    def __init__(self, group_commit: GroupCommit, executor: Executor) -> None:
        self._group_commit = group_commit
        self._executor = executor
        self._under_way = 0

    async def submit(self, built: BuiltRequest) -> Accepted:
        """Accept a small request as `GroupCommit.submit` does. Its builder is closed afterwards."""
        waiting = self._group_commit.add(built)
        # Not when this coroutine ends: if its caller is cancelled, a commit may still be reading the request.
        waiting.accepted.add_done_callback(lambda _: built.builder.close())
        self._start()
        return await asyncio.wrap_future(waiting.accepted)

    def _start(self) -> None:
        if self._under_way < _COMMITS and not self._group_commit.is_idle:
            self._under_way += 1
            commit = asyncio.get_running_loop().run_in_executor(self._executor, self._group_commit.commit)
            commit.add_done_callback(self._ended)

    def _ended(self, commit: asyncio.Future[None]) -> None:
        self._under_way -= 1
        if commit.cancelled():
            return
        if error := commit.exception():
            logger.error("a commit failed", exc_info=error)
        self._start()
