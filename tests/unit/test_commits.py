"""Coroutines hand small requests to the group commit."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from mdstore.aio.commits import submit
from mdstore.model import Reference
from mdstore.store.group_commit import COMMITS, GroupCommit
from mdstore.store.ingestor import Accepted, BuiltRequest


class Builder:
    """A builder that knows whether it is closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Commit(GroupCommit):
    """A group commit whose commits end when `go` is set. A request named "bad" fails."""

    def __init__(self) -> None:
        nothing = cast("Any", None)
        super().__init__(ingestor=nothing, payloads=nothing, ledger=nothing, publish=nothing)
        self.groups: list[list[str]] = []
        self.closed: list[bool] = []
        self.go = threading.Event()

    def commit(self) -> None:
        with self._committing:
            taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        group = [one for one in taken if one.accepted.set_running_or_notify_cancel()]
        self.groups.append([one.built.request_id for one in group])
        self.go.wait(10)
        for one in group:
            self.closed.append(cast("Builder", one.built.builder).is_closed)
            if one.built.request_id == "bad":
                one.accepted.set_exception(ValueError("bad"))
            else:
                one.accepted.set_result(accepted(one.built.request_id))


def accepted(request_id: str) -> Accepted:
    reference = Reference(v=1, request_id=request_id, payload="p", digest="d", lanes=1, source="s")
    return Accepted(request_id=request_id, reference=reference, operations=1, refused={}, new=True)


def built(request_id: str) -> BuiltRequest:
    return BuiltRequest(request_id=request_id, source="s", builder=cast("Any", Builder()))


async def reached(commit: Commit, groups: int) -> None:
    async with asyncio.timeout(10):
        while len(commit.groups) < groups:
            await asyncio.sleep(0.001)


def test_requests_share_a_few_commits() -> None:
    """However many requests there are, each is committed once, and few commits are under way."""

    async def scene() -> None:
        commit = Commit()
        submits = []
        for number in range(100):
            submits.append(asyncio.ensure_future(submit(commit, built(str(number)))))
            await asyncio.sleep(0)
            if number < COMMITS:
                await reached(commit, number + 1)
        assert commit.groups == [[str(number)] for number in range(COMMITS)]
        commit.go.set()
        assert [one.request_id for one in await asyncio.gather(*submits)] == [str(n) for n in range(100)]
        assert sorted(int(name) for group in commit.groups for name in group) == list(range(100))

    asyncio.run(scene())


def test_a_failure_is_that_of_its_request() -> None:
    """The others are accepted, and all builders are closed afterwards."""

    async def scene() -> None:
        commit = Commit()
        commit.go.set()
        requests = [built(name) for name in ("a", "bad", "c")]
        found = await asyncio.gather(*(submit(commit, one) for one in requests), return_exceptions=True)
        assert [type(one) for one in found] == [Accepted, ValueError, Accepted]
        assert all(cast("Builder", one.builder).is_closed for one in requests)
        assert commit.closed == [False] * 3

    asyncio.run(scene())


def test_a_cancelled_caller_takes_no_request_out_of_a_commit() -> None:
    """Its builder stays open until the commit has read it, because a commit fails for all if it cannot read one."""

    async def scene() -> None:
        commit = Commit()
        request = built("a")
        submitted = asyncio.ensure_future(submit(commit, request))
        await asyncio.sleep(0)
        await reached(commit, 1)
        submitted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitted
        commit.go.set()
        async with asyncio.timeout(10):
            while not cast("Builder", request.builder).is_closed:
                await asyncio.sleep(0.001)
        assert commit.closed == [False]

    asyncio.run(scene())
