"""Coroutines that ask at the same time share their reads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from mdstore.aio.batch_loader import BatchLoader
from mdstore.errors import Unavailable


class Table:
    """A table whose reads end when `answer` is called; the value of a key is its length, and "absent" is not found."""

    def __init__(self) -> None:
        self.reads: list[list[str]] = []
        self.pending: list[asyncio.Future[None]] = []

    async def read(self, keys: Sequence[str]) -> Mapping[str, int]:
        self.reads.append(list(keys))
        self.pending.append(asyncio.get_running_loop().create_future())
        await self.pending[-1]
        return {key: len(key) for key in keys if key != "absent"}

    async def answer(self) -> None:
        """Let the reads that are under way end, and those start that waited for them."""
        pending, self.pending = self.pending, []
        for one in pending:
            one.set_result(None)
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_lone_key_is_read_at_once() -> None:
    """It waits for nobody, and what is not found is None."""

    async def scene() -> None:
        table = Table()
        loader = BatchLoader(table.read, calls=1)
        asked = [asyncio.ensure_future(loader.get(key)) for key in ("a", "absent")]
        await settled()
        assert table.reads == [["a", "absent"]]
        await table.answer()
        assert [one.result() for one in asked] == [1, None]

    asyncio.run(scene())


def test_what_is_asked_for_meanwhile_forms_the_next_call() -> None:
    """No more calls are under way than allowed, and a key that is asked for again is read again."""

    async def scene() -> None:
        table = Table()
        loader = BatchLoader(table.read, calls=2)
        asked = []
        for key in ("a", "b", "a", "c", "c", "d"):
            asked.append(asyncio.ensure_future(loader.get(key)))
            await settled()
        assert table.reads == [["a"], ["b"]]
        await table.answer()
        assert table.reads == [["a"], ["b"], ["a", "c", "d"]]
        assert [one.done() for one in asked] == [True, True, False, False, False, False]
        await table.answer()
        assert [one.result() for one in asked] == [1] * 6

    asyncio.run(scene())


def test_a_call_reads_a_hundred_keys_at_most() -> None:
    """More are divided among the calls that may be under way, and the rest follows."""

    async def scene() -> None:
        table = Table()
        loader = BatchLoader(table.read, calls=2)
        asked = [asyncio.ensure_future(loader.get(f"{n:03d}")) for n in range(250)]
        await settled()
        assert [len(keys) for keys in table.reads] == [100, 100]
        await table.answer()
        assert [len(keys) for keys in table.reads] == [100, 100, 50]
        await table.answer()
        assert [one.result() for one in asked] == [3] * 250

    asyncio.run(scene())


def test_a_failed_call_fails_only_its_own_keys() -> None:
    """Each caller gets an error of its own, and the next call is made."""

    async def scene() -> None:
        fails = True

        async def read(keys: Sequence[str]) -> Mapping[str, int]:
            await asyncio.sleep(0)
            if fails:
                raise Unavailable("throttled", code="Throttled")
            return dict.fromkeys(keys, 1)

        loader = BatchLoader(read, calls=1)
        errors = await asyncio.gather(loader.get("a"), loader.get("a"), loader.get("b"), return_exceptions=True)
        assert [(type(error), str(error)) for error in errors] == [(Unavailable, "Throttled: throttled")] * 3
        assert len(set(map(id, errors))) == 3
        assert all(isinstance(error, Unavailable) and error.code == "Throttled" for error in errors)
        fails = False
        assert await loader.get("a") == 1

    asyncio.run(scene())


def test_a_cancelled_caller_takes_nothing_from_others() -> None:
    """The others get their values."""

    async def scene() -> None:
        table = Table()
        loader = BatchLoader(table.read, calls=1)
        asked = [asyncio.ensure_future(loader.get("a")) for _ in range(2)]
        await settled()
        asked[0].cancel()
        await table.answer()
        assert asked[0].cancelled()
        assert asked[1].result() == 1

    asyncio.run(scene())


def test_closing_cancels_who_waits() -> None:
    """So does it for keys that no call reads yet."""

    async def scene() -> None:
        table = Table()
        loader = BatchLoader(table.read, calls=1)
        asked = [asyncio.ensure_future(loader.get("a"))]
        await settled()
        asked.append(asyncio.ensure_future(loader.get("b")))
        await settled()
        loader.close()
        for one in asked:
            with pytest.raises(asyncio.CancelledError):
                await one

    asyncio.run(scene())
