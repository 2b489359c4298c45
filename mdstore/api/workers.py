"""Several server processes on one port, and the parent that starts them, replaces those that die, and stops them all.

Each listens on a socket of its own with SO_REUSEPORT, and the kernel deals out the connections. If they shared one socket, the
first process to wake up would take most of the connections of a burst.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PAUSE = 1.0  # seconds between two starts of one worker, so that one that dies at once does not fill the log
# A forked child has the parent's modules at once. The parent has no threads, which a fork would leave behind.
_context = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What a worker knows of its parent: a pipe that ends with it, and how to report that the worker serves."""

    pipe: int
    report_start: Callable[[], None]


@dataclass(kw_only=True)
class _Worker:
    process: ForkProcess
    has_started: Event
    began: float = field(default_factory=time.monotonic)


class Workers:
    """Runs `serve` in `count` processes. The parent must have no threads."""

    def __init__(self, count: int, serve: Callable[[Parent], None]) -> None:
        self._count = count
        self._serve = serve
        self._workers: list[_Worker] = []
        self._signals: list[int] = []
        self._wake, self._waker = socket.socketpair()
        self._pipe, self._pipe_end = os.pipe()

    def run(self) -> bool:
        """Serve until a signal ends all workers, then raise that signal. Return False at once if none of them could start."""
        with self._signals_noted():
            for _ in range(self._count):
                self._start()
            while not self._signals:
                self._wait()
                if not self._replace_dead():
                    break
            self._stop()
        for number in self._signals[:1]:
            signal.raise_signal(number)
        return bool(self._signals)

    def _start(self) -> None:
        has_started = _context.Event()
        process = _context.Process(target=self._run_worker, args=(has_started,))
        # A signal that came before the child has its own handlers would be the parent's, and the child would live on.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._workers.append(_Worker(process=process, has_started=has_started))

    def _run_worker(self, has_started: Event) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(self._pipe_end)
        self._serve(Parent(pipe=self._pipe, report_start=has_started.set))

    def _replace_dead(self) -> bool:
        """Start a worker for each that has died. Return False if a worker died at its start, and none has ever served."""
        has_served = any(one.has_started.is_set() for one in self._workers)
        for worker in self._take_dead():
            if not has_served:
                return False
            logger.warning("API process %d ended with code %s", worker.process.pid, worker.process.exitcode)
            while not self._signals and (pause := worker.began + _PAUSE - time.monotonic()) > 0:
                self._wait(pause)
            if not self._signals:
                self._start()
        return True

    def _stop(self) -> None:
        """Let the workers finish their calls, and kill them if a second signal comes."""
        signals = len(self._signals)
        for worker in self._workers:
            worker.process.terminate()
        while self._workers:
            self._wait()
            self._take_dead()
            if len(self._signals) > signals:
                for worker in self._workers:
                    worker.process.kill()

    def _take_dead(self) -> list[_Worker]:
        """Remove the workers that have ended from the list, and return them."""
        dead = [one for one in self._workers if one.process.exitcode is not None]
        self._workers = [one for one in self._workers if one not in dead]
        return dead

    def _wait(self, timeout: float | None = None) -> None:
        """Wait until a worker ends or a signal comes. A worker that has ended has its exit code afterwards."""
        workers = {one.process.sentinel: one.process for one in self._workers}
        ready = wait([*workers, self._wake], timeout)
        if self._wake in ready:
            self._wake.recv(64)
        for sentinel in workers.keys() & ready:
            workers[sentinel].join()

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        self._waker.setblocking(False)
        wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda one, _: self._signals.append(one)) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
