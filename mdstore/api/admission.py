"""Admission control: bounds the number and the bytes of request bodies that are held at once, in all and for one source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import HTTPException

from mdstore.settings import Settings

_PATIENCE = 10.0  # seconds to wait until another body is done
_LARGEST_BODIES = 8  # all bodies together may have the bytes of this many bodies of the largest size


class _Share:
    """What may be held at the same time, in all or by one source. In its context, the caller has one of the slots."""

    def __init__(self, *, bodies: int, size: int, status: int, whose: str) -> None:
        self._slots = asyncio.Semaphore(bodies)
        self._most = size
        self._status, self._whose = status, whose
        self.users = 0
        self.size = 0

    async def __aenter__(self) -> None:
        if self._slots.locked():
            await self._wait()
        else:
            await self._slots.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._slots.acquire()
        except TimeoutError:
            raise self._busy() from None

    def check(self, size: int) -> None:
        """Raise an `HTTPException` if `size` more bytes are too many."""
        if self.size + size > self._most:
            raise self._busy()

    def _busy(self) -> HTTPException:
        detail = f"Too many request bodies {self._whose} are under way. Repeat the call later, or send fewer at a time."
        return HTTPException(self._status, detail, headers={"Retry-After": "1"})


class Slot:
    """The slot of one body, and the bytes that it holds."""

    def __init__(self, *shares: _Share) -> None:
        self._shares = shares
        self.size = 0

    def hold(self, size: int) -> None:
        """Reserve room for `size` bytes of the body in total. Raises an `HTTPException` with status 429 or 503."""
        more = size - self.size
        if more > 0:
            for share in self._shares:
                share.check(more)
            self._add(more)

    def release(self) -> None:
        """Give all bytes back."""
        self._add(-self.size)

    def _add(self, size: int) -> None:
        self.size += size
        for share in self._shares:
            share.size += size


class Admission:
    """Hands out slots for bodies. One source may have half of all slots and bytes, and at least one body of any size."""

    def __init__(self, settings: Settings) -> None:
        self._bodies = settings.api_max_bodies
        self._size = _LARGEST_BODIES * settings.api_max_body_bytes
        self._all = _Share(bodies=self._bodies, size=self._size, status=503, whose="of all sources")
        self._sources: dict[str, _Share] = {}  # those that have a body under way

    @asynccontextmanager
    async def slot(self, source: str) -> AsyncIterator[Slot]:
        """Wait for a slot for a body of `source`: up to ten seconds among its own bodies, and as long among those of all.

        Raises an `HTTPException` with status 429 or 503.
        """
        own = self._sources.get(source)
        if own is None:
            half = (self._bodies + 1) // 2
            own = _Share(bodies=half, size=self._size // 2, status=429, whose="of this source")
            self._sources[source] = own
        own.users += 1
        try:
            async with own, self._all:
                slot = Slot(own, self._all)
                try:
                    yield slot
                finally:
                    slot.release()
        finally:
            own.users -= 1
            if not own.users:
                del self._sources[source]
