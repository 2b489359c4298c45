"""Submits small requests from coroutines to the group commit, whose calls to AWS block threads: a few for all requests."""

from __future__ import annotations

import asyncio

from mdstore.store.group_commit import GroupCommit
from mdstore.store.ingestor import Accepted, BuiltRequest


async def submit(group_commit: GroupCommit, built: BuiltRequest) -> Accepted:
    """Accept a small request as `GroupCommit.submit` does. Its builder is closed afterwards."""
    waiting = group_commit.add(built)
    # Not when this coroutine ends: if its caller is cancelled, a commit may still be reading the request.
    waiting.accepted.add_done_callback(lambda _: built.builder.close())
    # Not now: others who are woken in the same turn of the event loop come along.
    asyncio.get_running_loop().call_soon(group_commit.start)
    return await asyncio.wrap_future(waiting.accepted)
