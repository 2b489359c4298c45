"""The result of a request that was accepted before: its summary in the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery import states
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, assert_will_not_block

from mdstore.errors import NotFound
from mdstore.model import FINAL_STATES
from mdstore.store.ledger import Ledger


class KnownRequestResult(AsyncResult):  # Celery has no types
    """The result of a request that was accepted before this call.

    The result backend may hold nothing under the request's id: the result has expired, or the request was sent under another
    task's id. It may also hold the failure of an earlier run. So the ledger answers, as long as it knows the request.
    """

    def __init__(self, request_id: str, *, ledger: Ledger, **options: Any) -> None:
        super().__init__(request_id, **options)
        self._ledger = ledger

    def _get_task_meta(self) -> Any:
        if self._cache:
            return self._cache
        try:
            request = self._ledger.get(self.id)
        except NotFound:  # the producer's record is late or lost, so the request's first run is not over
            return super()._get_task_meta()
        is_final = request.state in FINAL_STATES
        meta = {
            "task_id": self.id,
            "status": states.SUCCESS if is_final else states.STARTED if request.started_at else states.PENDING,
            "result": request.summary() if is_final else None,
            "traceback": None,
            "children": [],
        }
        return self._maybe_set_cache(meta)

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
        while not self.ready():
            if deadline is not None and time.monotonic() >= deadline:
                raise CeleryTimeoutError("The operation timed out.")
            if on_interval:
                on_interval()
            time.sleep(interval)
        return super().get(propagate=propagate, disable_sync_subtasks=disable_sync_subtasks, **options)

    wait = get
