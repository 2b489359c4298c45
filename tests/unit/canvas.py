"""A Celery app that keeps its messages in the test and its results in memory.

A test delivers each message, as often as it likes.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

from celery.app.task import Context
from celery.canvas import signature

from mdstore.queue import create_app
from mdstore.queue.results.backend import DynamoBackend
from mdstore.queue.results.chord_state import ChordStates
from mdstore.settings import load_settings
from tests.unit.fake_results_table import ResultsTable
from tests.unit.fakes import MemoryObjects


class SmallShards(DynamoBackend):
    """Puts two indexes into a shard, so that chords of more than two parts have several shards."""

    @property
    def _chord_states(self) -> ChordStates:
        return ChordStates(dynamo=self._dynamo, table=self._table, retention=self._retention, shard=2)


class Canvas:
    """Runs canvases without a broker. `sent` holds the messages not yet delivered, `published` holds all messages in order."""

    def __init__(self, backend: str = "tests.unit.canvas:SmallShards", **conf: Any) -> None:
        settings = load_settings({}).settings
        self.table = ResultsTable()
        self.objects = MemoryObjects()
        self.app = create_app(
            settings, result_backend=backend, broker_url="memory://", broker_transport="memory", **conf
        )
        aws = SimpleNamespace(dynamo=self.table, objects=self.objects, owner_pid=os.getpid())
        self.app._aws = aws  # type: ignore[assignment]
        self.app.send_task = self._send  # type: ignore[method-assign]
        self.published: list[SimpleNamespace] = []
        self.sent: list[SimpleNamespace] = []

    @property
    def backend(self) -> DynamoBackend:
        """Return this thread's backend."""
        backend: DynamoBackend = self.app.backend
        return backend

    def s(self, name: str, *args: Any, immutable: bool = False, **options: Any) -> Any:
        """Return a signature of a task that is not registered."""
        return self.app.signature(name, args=args, immutable=immutable, **options)

    def _send(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        for unsent in ("producer", "task_type", "result_cls"):
            options.pop(unsent, None)
        message = SimpleNamespace(**json.loads(json.dumps({"task": name, "args": args, "kwargs": kwargs, **options})))
        self.published.append(message)
        self.sent.append(message)
        return self.app.AsyncResult(options["task_id"])

    def request(self, message: SimpleNamespace, *, ignore_result: bool = False) -> Context:
        """Return the request that a worker would make of a message."""
        known = vars(message)
        return Context(
            id=message.task_id, task=message.task, args=message.args, kwargs=message.kwargs, ignore_result=ignore_result,
            group=known.get("group_id"), group_index=known.get("group_index"), chord=known.get("chord"),
            chain=known.get("chain"), errbacks=known.get("link_error"), callbacks=known.get("link"),
            root_id=known.get("root_id"), delivery_info={},
        )  # fmt: skip

    def succeed(self, message: SimpleNamespace, value: Any, *, ignore_result: bool = False) -> None:
        """Deliver a message once, to a task that returns `value`. Like Celery, publish the next task of its chain first."""
        request = self.request(message, ignore_result=ignore_result)
        if request.chain:
            following = signature(request.chain[-1], app=self.app)
            following.apply_async((value,), chain=request.chain[:-1])
        self.backend.mark_as_done(message.task_id, value, request, not ignore_result)

    def fail(self, message: SimpleNamespace, error: Exception, *, ignore_result: bool = False) -> None:
        """Deliver a message once, to a task that raises `error`."""
        request = self.request(message, ignore_result=ignore_result)
        self.backend.mark_as_failure(message.task_id, error, request=request, store_result=not ignore_result)

    def take(self, task: str) -> list[SimpleNamespace]:
        """Remove the undelivered messages of a task, and return them."""
        found = [message for message in self.sent if message.task == task]
        self.sent = [message for message in self.sent if message.task != task]
        return found
