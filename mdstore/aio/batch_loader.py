"""Gathers what coroutines ask for while calls are under way: the next call reads it all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Generic, TypeVar

from mdstore.errors import MdstoreError

K = TypeVar("K")
V = TypeVar("V")


class BatchLoader(Generic[K, V]):
    """Reads values by key through `read`, which takes up to `size` distinct keys and leaves out those that it does not find.

    While fewer than `calls` reads are under way, the next one starts at once, so a lone key waits for nobody. A key is never
    read by a call that had begun before it was asked for: what was written before that is seen.

    It belongs to the event loop in which it is used.
    """

    def __init__(self, read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]], *, calls: int, size: int = 100) -> None:
        self._read = read
        self._most_calls = calls
        self._size = size
        self._waiting: dict[K, list[asyncio.Future[V | None]]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._is_scheduled = False

    async def get(self, key: K) -> V | None:
        """Return the value of `key`, or None if there is none. Raises what `read` raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[V | None] = loop.create_future()
        self._waiting.setdefault(key, []).append(future)
        # Not now: others who are woken in the same turn of the event loop come along.
        if not self._is_scheduled and len(self._calls) < self._most_calls:
            self._is_scheduled = True
            loop.call_soon(self._start)
        return await future

    def close(self) -> None:
        """Cancel the calls that are under way, and who waits for them."""
        for call in self._calls:
            call.cancel()
        for futures in self._waiting.values():
            for future in futures:
                future.cancel()
        self._waiting.clear()

    def _start(self) -> None:
        self._is_scheduled = False
        while self._waiting and len(self._calls) < self._most_calls:
            asked = {key: self._waiting.pop(key) for key in list(islice(self._waiting, self._size))}
            call = asyncio.get_running_loop().create_task(self._load(asked))
            self._calls.add(call)
            call.add_done_callback(self._ended)

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._start()

    async def _load(self, asked: Mapping[K, Sequence[asyncio.Future[V | None]]]) -> None:
        try:
            found = await self._read(list(asked))
        except asyncio.CancelledError:
            for future in _unanswered(asked.values()):
                future.cancel()
            raise
        except Exception as error:  # every caller raises it
            for future in _unanswered(asked.values()):
                future.set_exception(_twin(error))
        else:
            for key, futures in asked.items():
                for future in _unanswered([futures]):
                    future.set_result(found.get(key))


def _unanswered(futures: Iterable[Sequence[asyncio.Future[V | None]]]) -> Iterator[asyncio.Future[V | None]]:
    """Yield the futures of callers that still wait; others were cancelled."""
    return (future for some in futures for future in some if not future.done())


def _twin(error: Exception) -> Exception:
    """Return an error for one caller: each raise adds to an error's traceback, and callers must not see those of others."""
    if not isinstance(error, MdstoreError):
        return error
    twin = copy(error)
    twin.__cause__ = error
    return twin
