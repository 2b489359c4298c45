"""A result backend on DynamoDB whose chords survive duplicate deliveries, crashes and many parts.

Celery's own DynamoDB backend counts the parts that returned, so one duplicate delivery breaks a chord. This backend records
which parts returned (`chord_state`). The worker that completes a chord publishes the callback first and records that
afterwards. A crash in between publishes the callback again, under the same task id, and never loses it: a redelivered part
finds a callback that was not dispatched, and so does `repair`.

    id = chord-join-{group id} ...    see `chord_state`; the backend adds `callback` (its signature), or `blob` (where in S3 the
                                      signature is), and `nested` (true if the results are nested as the header's groups are)
    id = celery-...                   see `results`

The option `join` of a chord's body, as in `chord(header, body.set(join="any"))`, says whether the body runs once all parts have
returned:

    all       if all parts succeeded, with their results; otherwise it fails with a ChordError (the default, as in Celery)
    any       if at least one part succeeded, with the results of those that did, in their order; otherwise it fails
    always    in any case; instead of the result of a part that failed, it gets
              {"task_id", "status", "exc_type", "exc_module", "exc_message"}

A body that failed still runs if its failed parts are delivered again and succeed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from celery import states
from celery.canvas import _chord as CeleryChord  # noqa: N812  Celery's class of chords has a private name
from celery.canvas import group as CeleryGroup  # noqa: N812  Celery's class of groups has a function's name
from celery.canvas import maybe_signature, signature
from celery.exceptions import ChordError, ImproperlyConfigured
from celery.result import GroupResult
from celery.utils import uuid
from celery.utils.functional import _regen as CeleryGenerated  # noqa: N812
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import bytes_to_str

from mdstore.errors import (
    ConditionFailed,
    DeploymentBroken,
    InvalidRequest,
    RequestRejected,
    ResultNotRecorded,
    Unavailable,
)
from mdstore.queue.broker.publisher import Unsent
from mdstore.queue.results.canvas import (
    JOIN_POLICIES,
    final_tasks,
    first_task,
    is_chord_part,
    join_policy,
    wants_results,
)
from mdstore.queue.results.chord_state import ChordState, ChordStates
from mdstore.queue.results.results import DynamoResults
from mdstore.queue.results.shard import Part
from mdstore.queue.worker.outages import is_redelivered

logger = get_logger(__name__)

#: The largest callback, in bytes, that a chord's root item holds; a larger one is stored in S3. The root is written at least
#: twice per shard, and each write is charged by the item's size.
_MAX_INLINE_CALLBACK = 16 * 2**10
#: Seconds for which `repair` leaves a complete chord alone: the worker that completed it may be publishing the callback.
_PUBLISH_SECONDS = 60.0


class DynamoBackend(DynamoResults):
    """Stores the results and runs the chords of any app that `create_app` made. Each thread has its own instance."""

    _is_dispatching = False

    @property
    def _chord_states(self) -> ChordStates:
        return ChordStates(dynamo=self._dynamo, table=self._table, retention=self._retention)

    # -- the end of a task: if the callback needs a part's result, it is stored even if the part's task ignores results

    def mark_as_done(
        self, task_id: Any, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Store the result, and record the part. Raises `ResultNotRecorded`."""
        is_stored = store_result and not getattr(request, "ignore_result", False)
        with _recording_errors():
            if not is_stored and request and request.chord and wants_results(maybe_signature(request.chord)):
                self.store_result(task_id, result, state, request=request)
            super().mark_as_done(task_id, result, request, store_result, state)

    def mark_as_failure(
        self,
        task_id: Any,
        exc: Any,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        **kwargs: Any,
    ) -> None:
        """Store the failure, and record the part. Raises `ResultNotRecorded`.

        Store nothing if the message will be delivered again, because then the task has not failed yet.
        """
        if is_redelivered(exc) and self._is_acknowledged_late(request):
            return
        with _recording_errors():
            super().mark_as_failure(task_id, exc, traceback, request, store_result or is_chord_part(request), **kwargs)

    def mark_as_refused(self, task_id: Any, exc: Any, request: Any) -> bool:
        """Store a provisional failure for a message that no worker can execute, and notify all that depends on its task.

        Return False, and do nothing, if the task itself has ended. Raises `ResultNotRecorded`.
        """
        with _recording_errors(), self._storing_provisionally():
            if self._has_ended(task_id):
                return False
            super().mark_as_failure(task_id, exc, request=request)
        return True

    def _is_acknowledged_late(self, request: Any) -> bool:
        """Return whether a task's message still exists when the task has ended."""
        task = self.app.tasks.get(getattr(request, "task", None))
        return task is None or bool(task.acks_late)

    def mark_as_retry(self, task_id: Any, exc: Any, *args: Any, **kwargs: Any) -> None:
        """Store the state. A failure to store it is only logged, because the message of the next try is sent already."""
        try:
            super().mark_as_retry(task_id, exc, *args, **kwargs)
        except ResultNotRecorded as error:
            logger.warning("task %s will be retried, but its state could not be stored: %s", task_id, error)

    def mark_as_revoked(
        self, task_id: Any, reason: str = "", request: Any = None, store_result: bool = True, **kwargs: Any
    ) -> None:
        """Store the state, and record the part."""
        super().mark_as_revoked(task_id, reason, request, store_result or is_chord_part(request), **kwargs)

    def _fail_chain(self, chain: Any, exc: Any, *args: Any, **kwargs: Any) -> None:
        """Fail the rest of a chain and the tasks of a group in it. If the chain is a chord's part, record the part.

        Celery 5.7 assumes that a part whose stored state is a failure was recorded, but the worker may have died before that.
        So this method records the parts that Celery skips, and only those: a second record of a part could find the chord
        complete while another worker is failing the chord's body.
        """
        tasks = chain if isinstance(chain, list | tuple) else ()
        following = [maybe_signature(task, app=self.app) for task in tasks]
        skipped_by_celery = [task for task in following if self._is_failed_part(task)]
        super()._fail_chain(chain, exc, *args, **kwargs)
        for task in following:
            if isinstance(task, CeleryGroup) and (task in skipped_by_celery or not task.options.get("chord")):
                self._return_failed_group(task.tasks, exc)
            elif task in skipped_by_celery:
                self._return_failed_parts(task, exc)

    def _is_failed_part(self, task: Any) -> bool:
        """Return whether a signature is a chord's part whose stored state is a failure."""
        ends = list(final_tasks(task, self.app))
        if not any(end.options.get("chord") for end in ends):
            return False
        stored = [task] if isinstance(task, CeleryGroup) else ends
        return any(self.get_state(one.options["task_id"]) in states.PROPAGATE_STATES for one in stored)

    def _store_result(self, *args: Any, **kwargs: Any) -> Any:
        with _recording_errors():
            return super()._store_result(*args, **kwargs)

    # -- chords

    def apply_chord(self, header_result_args: Any, body: Any, **_: Any) -> None:
        """Store a chord's callback before any of the parts is published."""
        chord_id, results = header_result_args
        if join_policy(body) not in JOIN_POLICIES:
            raise ImproperlyConfigured(f"join={join_policy(body)!r}: expected one of {', '.join(JOIN_POLICIES)}")
        nested = not isinstance(results, CeleryGenerated) and any(isinstance(one, GroupResult) for one in results)
        if nested:
            self.app.GroupResult(chord_id, results).save(backend=self)
        callback = self._store_text(bytes_to_str(self.encode(body)), "callback", inline=_MAX_INLINE_CALLBACK)
        # A worker's task, or the dispatch of a callback, may be a repetition. A client applies a frozen chord on purpose.
        is_repeated = self._is_dispatching or self.app.current_worker_task is not None
        self._chord_states.open(chord_id, again="" if is_repeated else uuid(), nested=nested, **callback)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Store the number of parts. Celery calls this before it publishes the last part."""
        if chord_size > 0:
            self._chord_states.resize(group_id, chord_size)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Add a part, by its result's id, to a chord that is not complete."""
        self._chord_states.extend(chord_id, result.id)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:
        """Record that a part returned. The part that completes the chord dispatches the callback."""
        chord_id = request.group
        if getattr(request, "subtask_type", None) == "group":
            self._return_failed_group(request.kwargs["tasks"], result)
            return
        if not chord_id or not request.id:
            return
        try:
            part = Part(request.group_index or 0, request.id)
            chord_state = self._chord_states.record_part(chord_id, part, ok=state == states.SUCCESS)
        except ConditionFailed:
            logger.error("chord %s: part %s returned after the chord's state had expired", chord_id, request.id)  # noqa: TRY400
            return
        if chord_state.complete:
            self._dispatch_if_needed(chord_id, request.chord, chord_state)

    def _return_failed_group(self, tasks: Iterable[Any], exc: Any) -> None:
        """Fail the tasks of a group that a failed chain never started. Each of them is a part of the group's chord."""
        group = CeleryGroup(tasks, app=self.app)
        for end in final_tasks(group, self.app):
            self.store_result(end.options["task_id"], exc, states.FAILURE)
        self._return_failed_parts(group, exc)

    def repair(self, *, now: float | None = None) -> list[str]:
        """Dispatch the callbacks of chords that have been complete for a minute; return the chords' ids.

        The worker that completed such a chord died before it published the callback, and no redelivery has repaired that.
        Workers call this method (`RecoveryStep`). If one chord cannot be repaired, that is logged, and the others still are.
        """
        now = time.time() if now is None else now
        return [chord_id for chord_id in self._chord_states.undispatched(now) if self._repair_one(chord_id, now)]

    def _repair_one(self, chord_id: str, now: float) -> bool:
        """Repair a chord that has been complete for a minute. Return False for any other chord, or if the repair failed."""
        try:
            chord_state = self._chord_states.read(chord_id, now)
            if chord_state is None or not chord_state.complete or chord_state.at > now - _PUBLISH_SECONDS:
                return False
            self._dispatch_if_needed(chord_id, self.decode(self._load_text(chord_state.given, "callback")), chord_state)
        except Exception:
            logger.exception("chord %s could not be repaired", chord_id)
            return False
        return True

    def _dispatch_if_needed(self, chord_id: str, chord: Any, chord_state: ChordState) -> None:
        """Dispatch the callback of a complete chord unless it was dispatched before. `chord` is the callback's signature."""
        callback = signature(chord, app=self.app).clone()
        policy = join_policy(callback)
        for options in (callback.options, first_task(callback).options):
            options.pop("join", None)
        if chord_state.dispatched != "success":
            self._dispatch(chord_id, callback, chord_state, policy)

    def _dispatch(self, chord_id: str, callback: Any, chord_state: ChordState, policy: str) -> None:
        """Publish the callback, then record that: in this order a crash repeats the callback and never loses it."""
        try:
            results = self._results_for(callback, chord_id, chord_state, policy)
            for _ in range(chord_state.runs):
                self._publish(callback, results)
        except ChordError as error:
            if chord_state.dispatched:
                return
            self._fail_callback(callback, error)
            self._chord_states.mark_dispatched(chord_id, "failure")
        else:
            runs = self._chord_states.mark_dispatched(chord_id, "success")
            for _ in range(chord_state.runs, runs):  # the chord was applied again meanwhile
                self._publish(callback, results)

    def _publish(self, callback: Any, results: list[Any]) -> None:
        """Publish the callback. Raises `ChordError` if SQS will never accept its message; other errors pass unchanged."""
        self._is_dispatching = True
        try:
            callback.delay(results)
        except Unsent as error:
            if not error.is_refused:
                raise
            raise ChordError(f"Callback error: {error!r}") from error
        except (EncodeError, InvalidRequest, RequestRejected) as error:
            raise ChordError(f"Callback error: {error!r}") from error
        finally:
            self._is_dispatching = False

    def _results_for(self, callback: Any, chord_id: str, chord_state: ChordState, policy: str) -> list[Any]:
        """Return the results of the parts in their order, as the callback gets them, or an empty list if it takes none.

        Raises `ChordError` if the chord has failed by its policy.
        """
        wants = wants_results(callback)
        if chord_state.clean and not wants:
            return []
        returned = self._chord_states.returned(chord_id)
        if returned.failed and (policy == "all" or (policy == "any" and not returned.succeeded)):
            raise self._error_of(returned.failed[0])
        if not wants:
            return []
        parts = returned.succeeded if policy == "any" else returned.parts
        metas = self.metas([part.id for part in parts])
        values = {part.id: _result_or_failure(part.id, metas) for part in parts}
        if chord_state.given.get("nested"):
            return _nested_values(self.restore_group(chord_id, cache=False), values, requires_all=policy != "any")
        return list(values.values())

    def _error_of(self, part: Part) -> ChordError:
        """Return the error of a chord that failed because of a part."""
        meta = self.metas([part.id]).get(part.id)
        cause = self.meta_from_decoded(meta)["result"] if meta else None
        error = ChordError(f"Dependency {part.id} raised {cause!r}")
        if isinstance(cause, Exception):
            error.__cause__ = cause
        return error

    def _fail_callback(self, callback: Any, error: ChordError) -> None:
        """Fail a callback, call its errbacks, and record the failure in the chords that the callback is a part of."""
        while isinstance(callback, CeleryChord):  # a chord's result is that of its body
            body = maybe_signature(callback.body, app=self.app)
            body.extend_list_option("link_error", callback.options.get("link_error", []))
            body.options.setdefault("chain", callback.options.get("chain"))
            callback = body
        self.chord_error_from_stack(callback, error)
        self._return_failed_parts(callback, error)

    def _return_failed_parts(self, task: Any, exc: Any) -> None:
        """Record the chord parts that a signature ends with as failed, because the signature will never run."""
        for end in final_tasks(task, self.app):
            options = end.options
            if options.get("chord"):
                part = SimpleNamespace(
                    id=options.get("task_id"),
                    group=options.get("group_id"),
                    group_index=options.get("group_index"),
                    chord=options["chord"],
                )
                self.on_chord_part_return(part, states.FAILURE, exc)


@contextmanager
def _recording_errors() -> Iterator[None]:
    """Raise `ResultNotRecorded` for a failure to record a task's end, so that it is not mistaken for the task's own error."""
    try:
        yield
    except (Unavailable, DeploymentBroken) as error:
        raise ResultNotRecorded(str(error)) from error
    except Unsent as error:
        if error.is_refused:
            raise
        raise ResultNotRecorded(str(error)) from error


def _result_or_failure(part_id: str, metas: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a part's result, or its failure as a dictionary. Raises `ChordError` if the result has expired."""
    meta = metas.get(part_id)
    if meta is None:
        raise ChordError(f"Dependency {part_id}: its result has expired")
    if meta["status"] == states.SUCCESS:
        return meta["result"]
    return {"task_id": part_id, "status": meta["status"], **meta["result"]}


def _nested_values(result: Any, values: Mapping[str, Any], *, requires_all: bool) -> list[Any]:
    """Return the values in lists that are nested as the groups of the header's result are.

    With `requires_all`, raises `ChordError` if a part has no value.
    """
    missing = [one.id for one in result.results if not isinstance(one, GroupResult) and one.id not in values]
    if requires_all and missing:
        raise ChordError(f"Dependency {missing[0]}: the chord has no record of its return")
    return [
        _nested_values(one, values, requires_all=requires_all) if isinstance(one, GroupResult) else values[one.id]
        for one in result.results
        if isinstance(one, GroupResult) or one.id in values
    ]
