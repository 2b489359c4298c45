"""Clients of an HTTP server, all in one process that takes so little CPU that it is not what is measured.

`python -m benchmarks.load` reads an `Order` as JSON from standard input, and writes `Answers` as JSON. Each client keeps one
connection open, and makes its next call when the last one is answered. SIGTERM ends the calls, but not those under way.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import cast

import msgspec
import uvloop

from benchmarks.results import percentile

#: Stands for the number of the call, with as many digits, in the text of a call.
NUMBER = "000000000"
_STATUS = re.compile(rb"HTTP/1\.1 (\d+) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The calls to make: `call` is one whole HTTP request. Without `calls`, which is their number, they go on until SIGTERM."""

    port: int
    clients: int
    call: str
    calls: int | None = None
    first: int = 0  # the number of the first call


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """When each call began (seconds of the monotonic clock), how long it took, and how often each status was the answer."""

    began: list[float]
    took: list[float]
    statuses: dict[int, int]
    cpu: float

    @property
    def seconds(self) -> float:
        """From the first call's beginning to the last one's end."""
        return max(began + took for began, took in zip(self.began, self.took, strict=True)) - min(self.began)

    @property
    def rate(self) -> float:
        """Calls per second."""
        return len(self.took) / self.seconds

    def milliseconds(self, share: float, *, start: float = 0.0, end: float = float("inf")) -> float:
        """Return a percentile of the calls that were under way at some time from `start` to `end`."""
        calls = zip(self.began, self.took, strict=True)
        return percentile([took for began, took in calls if began < end and began + took > start], share) * 1e3


class _Client(asyncio.Protocol):
    def __init__(self, calls: Iterator[int], text: bytes) -> None:
        self._calls = calls
        self._text = text
        self._received = b""
        self.began: list[float] = []
        self.took: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass

    def call_next(self) -> None:
        """Make the next call, or close the connection after the last one."""
        number = next(self._calls, None)
        if number is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self.began.append(time.monotonic())
        self._transport.write(self._text.replace(NUMBER.encode(), b"%09d" % number))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        found = _LENGTH.search(self._received, 0, head + 2)
        if len(self._received) < head + 4 + (int(found[1]) if found else 0):
            return
        status = _STATUS.match(self._received)
        self._received = b""
        self.took.append(time.monotonic() - self.began[-1])
        self.statuses[int(status[1]) if status else 0] += 1
        self.call_next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed the connection"))


async def _make_calls(order: Order) -> Answers:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    numbers = count(order.first) if order.calls is None else range(order.first, order.first + order.calls)
    calls = takewhile(lambda _: not ended.is_set(), numbers)
    text = order.call.encode()
    clients = [
        (await loop.create_connection(lambda: _Client(calls, text), "127.0.0.1", order.port))[1]
        for _ in range(order.clients)
    ]
    cpu = time.process_time()
    for client in clients:
        client.call_next()
    await asyncio.gather(*(client.done for client in clients))
    return Answers(
        began=[began for client in clients for began in client.began],
        took=[took for client in clients for took in client.took],
        statuses=sum((client.statuses for client in clients), Counter()),
        cpu=time.process_time() - cpu,
    )


def http_call(method: str, path: str, body: str = "", **headers: str) -> str:
    """Return the text of an HTTP request; in the names of `headers`, `_` stands for `-`."""
    fields = {"host": "127.0.0.1", "content-length": str(len(body.encode())), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n{body}"


@contextmanager
def load(order: Order, *, expected: int) -> Iterator[Callable[[], Answers]]:
    """Make the calls in a process of their own; yields a function that ends endless ones and returns the answers.

    That function raises `RuntimeError` if the server answers with another status than the `expected` one.
    """
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    process.stdin.write(msgspec.json.encode(order))
    process.stdin.close()

    def end() -> Answers:
        if order.calls is None:
            process.terminate()
        text = process.stdout.read()  # type: ignore[union-attr]
        if process.wait():
            raise RuntimeError(f"the load's process exited with {process.returncode}")
        answers = msgspec.json.decode(text, type=Answers)
        if set(answers.statuses) != {expected}:
            raise RuntimeError(f"the server answered {answers.statuses}; expected {expected} only")
        return answers

    try:
        yield end
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def make_calls(order: Order, *, expected: int) -> Answers:
    """Make all calls in a process of their own, and wait for their answers. Raises `RuntimeError` as `load` says."""
    with load(order, expected=expected) as end:
        return end()


if __name__ == "__main__":
    given = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(_make_calls(given))))
