"""Callers that wait for requests share the reads of their states."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from mdstore.aio import status_poller
from mdstore.aio.status_poller import StatusPoller
from mdstore.errors import Unavailable
from mdstore.model import Counts, Reference, State
from mdstore.store.ledger_items import RequestStatus


def status(request_id: str, state: State) -> RequestStatus:
    reference = Reference(v=1, request_id=request_id, payload="p", digest="d", lanes=1, source="s")
    return RequestStatus(
        request_id=request_id,
        state=state,
        source="s",
        operations=1,
        lanes=1,
        reference=reference,
        early=Counts(),
        counts=Counts(),
        accepted_at=0.0,
    )


class Ledger:
    """The states of requests. It records what it was asked for."""

    def __init__(self, **states: State) -> None:
        self.states = states
        self.reads: list[list[str]] = []

    async def read(self, request_ids: Sequence[str]) -> Mapping[str, RequestStatus]:
        self.reads.append(sorted(request_ids))
        await asyncio.sleep(0)
        return {name: status(name, self.states[name]) for name in request_ids if name in self.states}


def test_all_who_wait_share_the_reads() -> None:
    """Each gets the status of its own request when that is final; an unknown request is waited for."""

    async def scene() -> None:
        ledger = Ledger(a=State.RUNNING, b=State.FAILED)
        poller = StatusPoller(ledger.read)
        waits = [asyncio.ensure_future(poller.until_final(name, seconds=10)) for name in ("a", "a", "b", "c")]
        assert (await waits[2]) == status("b", State.FAILED)
        ledger.states |= {"a": State.COMPLETED, "c": State.COMPLETED}
        assert await asyncio.gather(*waits[:2], waits[3]) == [
            *[status("a", State.COMPLETED)] * 2,
            status("c", State.COMPLETED),
        ]
        assert ledger.reads[0] == ["a", "b", "c"]

    asyncio.run(scene())


def test_nothing_is_read_while_nobody_waits() -> None:
    """The wait ends after its time with None, and so do the reads."""

    async def scene() -> None:
        ledger = Ledger(a=State.RUNNING)
        poller = StatusPoller(ledger.read)
        assert await poller.until_final("a", seconds=0.05) is None
        reads = len(ledger.reads)
        assert reads
        await asyncio.sleep(0.1)
        assert len(ledger.reads) <= reads + 1
        ledger.states["a"] = State.COMPLETED
        assert await poller.until_final("a", seconds=5) is not None

    asyncio.run(scene())


def test_a_caller_that_is_gone_is_waited_for_no_longer() -> None:
    """It is asked about before the wait."""

    async def gone() -> bool:
        await asyncio.sleep(0)
        return True

    async def scene() -> None:
        poller = StatusPoller(Ledger(a=State.RUNNING).read)
        assert await poller.until_final("a", seconds=60, is_gone=gone) is None

    asyncio.run(scene())


def test_a_failure_to_read_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and read again a while later."""
    monkeypatch.setattr(status_poller, "_AFTER_FAILURE", 0.01)

    async def scene() -> None:
        failures = [Unavailable("throttled", code="Throttled"), ValueError("a bug")]

        async def read(request_ids: Sequence[str]) -> Mapping[str, RequestStatus]:
            await asyncio.sleep(0)
            if failures:
                raise failures.pop()
            return {name: status(name, State.COMPLETED) for name in request_ids}

        assert await StatusPoller(read).until_final("a", seconds=10) is not None

    asyncio.run(scene())
    assert "throttled" in caplog.text
    assert "a bug" in caplog.text


def test_closing_cancels_who_waits() -> None:
    """Nothing is read any more."""

    async def scene() -> None:
        poller = StatusPoller(Ledger(a=State.RUNNING).read)
        wait = asyncio.ensure_future(poller.until_final("a", seconds=60))
        await asyncio.sleep(0.05)
        poller.close()
        with pytest.raises(asyncio.CancelledError):
            await wait

    asyncio.run(scene())
