"""The results of requests, from the ledger: it knows more than the result backend does, and messages cannot forge it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery import states
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, assert_will_not_block

from mdstore.errors import NotFound
from mdstore.model import State
from mdstore.store.ledger_items import RequestStatus


class RequestResult(AsyncResult):  # Celery has no types
    """The result of a task `mdstore.ingest`.

    If the task's id is that of its request, the ledger answers: the result is there when the request has ended, and a success
    is the request's summary. A message that only names this id may have stored anything in the result backend.
    """

    #: Whether a failed request's summary is its result as long as the backend holds no failure.
    _summarises_failures = False

    def _get_task_meta(self) -> Any:
        if self._cache:
            return self._cache
        try:
            request = self.app.store.ledger.get(self.id)
        except NotFound:  # the task has another id than its request
            return super()._get_task_meta()
        if request.is_follow_up and request.state is State.ACCEPTED:  # it waits for another task, which may fail
            return super()._get_task_meta()
        return self._maybe_set_cache(self._meta_of(request))

    def _meta_of(self, request: RequestStatus) -> dict[str, Any]:
        if request.state is State.FAILED:
            meta: dict[str, Any] = self.backend.get_task_meta(self.id, cache=False)
            if meta["status"] == states.FAILURE:
                return meta
        is_final = request.state is State.COMPLETED or (request.state is State.FAILED and self._summarises_failures)
        return {
            "task_id": self.id,
            "status": states.SUCCESS if is_final else states.STARTED if request.started_at else states.PENDING,
            "result": request.summary() if is_final else None,
            "traceback": None,
            "children": [],
        }

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        on_interval: Callable[[], Any] | None = None,
        disable_sync_subtasks: bool = True,
        **options: Any,
    ) -> Any:
        """Return the request's summary once its state is final. Raises Celery's `TimeoutError` after `timeout` seconds."""
        if disable_sync_subtasks:
            assert_will_not_block()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.ready() and not self.ignored:
            if propagate and self.parent and options.get("follow_parents", True):
                self._maybe_reraise_parent_error()
            if deadline is not None and time.monotonic() >= deadline:
                raise CeleryTimeoutError("The operation timed out.")
            if on_interval:
                on_interval()
            time.sleep(interval)
        return super().get(propagate=propagate, disable_sync_subtasks=disable_sync_subtasks, **options)

    wait = get


class KnownRequestResult(RequestResult):
    """The result of a request that was accepted before this call. The backend's result of it may have expired."""

    _summarises_failures = True
