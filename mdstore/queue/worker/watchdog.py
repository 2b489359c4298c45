"""Watch a worker: its loop must tick, its receives return and its leases be renewed. If one hangs, exit, to be restarted.

    receives, leases or the loop hang               log all stacks and open new connections; after twice the limit: exit 70
    tasks still run when the grace period ends      kill them and give their messages back: exit 71; a task that was
                                                    acknowledged early (`acks_late=False`) has no message, and fails

The limit is three long polls, but at least 30 s. The grace period begins with SIGTERM. It is at least
Celery's `worker_soft_shutdown_timeout`, once a soft shutdown has begun.

`GET /livez` on `worker_port` answers 200, or 503 with what is wrong. It reports failing receives as well, but the worker does
not exit for them: that would kill its tasks for an outage that is not theirs.
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
from celery.worker import state

from mdstore.queue.broker.channel import Channel

logger = get_logger(__name__)

EX_HANGS = 70
EX_GRACE = 71
_CHECK_EVERY = 1.0  # seconds
_RECORD_WITHIN = 3.0  # seconds
_MIN_LIMIT = 30.0  # seconds, however short the polls are


class Watchdog(bootsteps.StartStopStep):
    """Runs as a step of the worker, on one thread, and on one more for each health check under way."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._worker = worker
        self._settings = worker.app.settings
        self._limit = max(3.0 * self._settings.wait_time, _MIN_LIMIT)
        self._stops_at: float | None = None
        self._warned = False
        self._server: ThreadingHTTPServer | None = None

    def start(self, parent: Any) -> None:  # noqa: ARG002
        """Start checking the worker and answering health checks."""
        worker_shutting_down.connect(self._on_shutting_down, weak=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self._settings.worker_port:
            address = (self._settings.worker_host, self._settings.worker_port)
            self._server = ThreadingHTTPServer(address, _handler(self))
            threading.Thread(target=self._server.serve_forever, name="livez", daemon=True).start()

    def stop(self, parent: Any) -> None:
        """Do nothing: tasks may still run, and are watched until the worker's process ends."""

    terminate = stop

    def health(self) -> dict[str, Any]:
        """Return the body of `/livez`: the channel's liveness, and which of its ages exceed the limit."""
        liveness = self._liveness()
        wrong = [name for name in ("answer", "receive", "leases", "loop") if liveness.get(name, 0.0) > self._limit]
        return {"ok": not wrong, "wrong": wrong, **{name: round(value, 1) for name, value in liveness.items()}}

    def _liveness(self) -> dict[str, float]:
        return channel.liveness() if (channel := self._channel()) else {}

    def _channel(self) -> Channel | None:
        """Return the channel that tasks come from, or None while there is none."""
        consumer = getattr(self._worker, "consumer", None)
        channel = getattr(getattr(consumer, "task_consumer", None), "channel", None)
        return channel if isinstance(channel, Channel) else None

    def _on_shutting_down(self, **_: Any) -> None:
        if self._stops_at is None:
            self._stops_at = time.monotonic() + self._settings.shutdown_grace

    def _watch(self) -> None:
        while True:
            time.sleep(_CHECK_EVERY)
            try:
                self._check()
            except Exception:
                logger.exception("a check of the watchdog failed")

    def _check(self) -> None:
        if self._stops_at is not None:
            if time.monotonic() > max(self._stops_at, getattr(self._worker, "soft_shutdown_ends", 0.0)):
                self._end_tasks()
            return
        liveness = self._liveness()
        hung_for = max(liveness.get(name, 0.0) for name in ("receive", "leases", "loop"))
        if hung_for > 2 * self._limit:
            logger.critical("the worker has hung for %d s: exit", hung_for)
            os._exit(EX_HANGS)
        if hung_for > self._limit and not self._warned:
            logger.error("the worker has hung for %d s: %s\n%s", hung_for, liveness, _stacks())
            self._worker.app.aws.queues.http.close()
        self._warned = hung_for > self._limit

    def _end_tasks(self) -> None:
        """Kill the tasks that still run, and give their messages back. A task whose message is already deleted has failed."""
        lost = [request for request in tuple(state.active_requests) if request.acknowledged]
        logger.error(
            "tasks did not finish within %d s: they are killed, and their messages redelivered; %d of them were acknowledged"
            " before they began, and have failed: %s",
            self._settings.shutdown_grace,
            len(lost),
            ", ".join(f"{request.name}[{request.id}]" for request in lost) or "none",
        )
        pool = getattr(getattr(self._worker, "pool", None), "_pool", None)
        for process in getattr(pool, "_pool", None) or ():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        # AWS may not answer, and whoever stops the worker waits no longer than the grace period and a few seconds.
        failing = threading.Thread(target=_record_lost, args=(lost,), name="lost tasks", daemon=True)
        failing.start()
        if (channel := self._channel()) is not None:
            channel.give_back()
        failing.join(_RECORD_WITHIN)
        os._exit(EX_GRACE)


def _record_lost(requests: list[Any]) -> None:
    for request in requests:
        try:
            request.record_lost()
        except Exception:
            logger.exception("task %s was killed, which could not be recorded", request.id)


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
            self.wfile.write(self._answer())

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> bytes:
            """Send the status and the headers, and return the body."""
            if self.path != "/livez":
                self.send_error(404)  # sends its body itself, where there is one
                return b""
            health = watchdog.health()
            body = json.dumps(health).encode()
            self.send_response(200 if health["ok"] else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return body

        def log_message(self, *_: Any) -> None:
            """Log nothing: a line for each check would be noise."""

    return Handler
