"""Sees that a worker works: its loop goes round, and its receives return. What hangs is shown, and in the end restarted.

    receives that do not return, a loop that hangs     stacks in the log, new connections; the same time again: exit 70
    SIGTERM, and tasks that go on after the grace      they are killed, their messages given back, exit 71

`GET /livez` on `worker_port` answers 200, or 503 with what is wrong: a receive that fails is wrong there too, but no reason to
exit, because whoever is at work would be killed for an outage that is not his.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from celery import bootsteps
from celery.signals import worker_shutting_down
from celery.utils.log import get_logger

from mdstore.queue.broker.channel import Channel

logger = get_logger(__name__)

EX_HANGS = 70
EX_GRACE = 71
_LOOK_EVERY = 1.0  # seconds
_AT_LEAST = 30.0  # seconds, however short the polls are


class Watchdog(bootsteps.StartStopStep):
    """A step of the worker; one thread, and one for each health check under way."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._worker = worker
        self._settings = worker.app.settings
        self._limit = max(3.0 * self._settings.wait_time, _AT_LEAST)
        self._stops_at: float | None = None
        self._warned = False
        self._server: ThreadingHTTPServer | None = None

    def start(self, parent: Any) -> None:  # noqa: ARG002
        """Begin to look, and to answer."""
        worker_shutting_down.connect(self._on_shutting_down, weak=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self._settings.worker_port:
            address = (self._settings.worker_host, self._settings.worker_port)
            self._server = ThreadingHTTPServer(address, _handler(self))
            threading.Thread(target=self._server.serve_forever, name="livez", daemon=True).start()

    def stop(self, parent: Any) -> None:
        """Nothing: tasks may go on, and are watched until the worker's process ends."""

    terminate = stop

    def health(self) -> dict[str, Any]:
        """What `/livez` says: seconds since the last sign of life, and what is wrong, if anything."""
        pulse = self._pulse()
        wrong = [name for name in ("answer", "receive", "loop") if pulse.get(name, 0.0) > self._limit]
        return {"ok": not wrong, "wrong": wrong, **{name: round(value, 1) for name, value in pulse.items()}}

    def _pulse(self) -> dict[str, float]:
        return channel.pulse() if (channel := self._channel()) else {}

    def _channel(self) -> Channel | None:
        """The channel that tasks come from, while there is one."""
        consumer = getattr(self._worker, "consumer", None)
        channel = getattr(getattr(consumer, "task_consumer", None), "channel", None)
        return channel if isinstance(channel, Channel) else None

    def _on_shutting_down(self, **_: Any) -> None:
        if self._stops_at is None:
            self._stops_at = time.monotonic() + self._settings.shutdown_grace

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY)
            try:
                self._look()
            except Exception:
                logger.exception("the watchdog stumbled")

    def _look(self) -> None:
        if self._stops_at is not None:
            if time.monotonic() > self._stops_at:
                self._end_tasks()
            return
        pulse = self._pulse()
        hangs = max(pulse.get("receive", 0.0), pulse.get("loop", 0.0))
        if hangs > 2 * self._limit:
            logger.critical("the worker hangs for %d s: exit", hangs)
            os._exit(EX_HANGS)
        if hangs > self._limit and not self._warned:
            logger.error("the worker hangs for %d s: %s\n%s", hangs, pulse, _stacks())
            self._worker.app.aws.queues.http.close()
        self._warned = hangs > self._limit

    def _end_tasks(self) -> None:
        """Kill what is still at work, and give its messages back."""
        logger.error("tasks did not end within %d s: killed, their messages come again", self._settings.shutdown_grace)
        pool = getattr(getattr(self._worker, "pool", None), "_pool", None)
        for process in getattr(pool, "_pool", None) or ():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if (channel := self._channel()) is not None:
            channel.give_back()
        os._exit(EX_GRACE)


def _stacks() -> str:
    frames = sys._current_frames()
    return "\n".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.ident in frames
    )


def _handler(watchdog: Watchdog) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/livez":
                self.send_error(404)
                return
            health = watchdog.health()
            body = json.dumps(health).encode()
            self.send_response(200 if health["ok"] else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """A check a second is not worth a line."""

    return Handler
