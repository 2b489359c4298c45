"""A result backend on DynamoDB whose chords survive duplicate deliveries, crashes and many parts.

Celery's own counts the parts that returned, so one message delivered twice breaks the chord. Here a chord keeps the set of
the parts that returned (`chord_state`). Whoever completes it publishes the callback and records that afterwards, so a crash
repeats the callback, under the same task id, and never loses it: a redelivered part finds what was left undone, and so does
`repair`.

    id = chord-join-{group id} ...    see `chord_state`; given: callback (its signature), or blob; nested (results are in lists)
    id = celery-...                   see `results`

When its parts have all returned, the option `chord_state` of a chord's body says what follows, as in
`chord(header, body.set(chord_state="any"))`:

    all       the body runs with the parts' results; where a part failed, it fails with a ChordError (as in Celery; the default)
    any       the body runs with the results of those that succeeded, in their order; where none did, it fails
    always    the body runs whatever happened; a part that failed is given as
              {"task_id", "status", "exc_type", "exc_module", "exc_message"}

A failed body runs after all when its failed parts are delivered again and succeed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from celery import states
from celery.canvas import _chain as CeleryChain  # noqa: N812  celery's class of chains has a private name
from celery.canvas import _chord as CeleryChord  # noqa: N812
from celery.canvas import group as CeleryGroup  # noqa: N812  celery's class of groups has a function's name
from celery.canvas import maybe_signature, signature
from celery.exceptions import ChordError, ImproperlyConfigured
from celery.result import GroupResult
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
from mdstore.queue.results.chord_state import ChordState, ChordStates
from mdstore.queue.results.results import DynamoResults
from mdstore.queue.results.shard import Part
from mdstore.queue.worker.outages import comes_again

logger = get_logger(__name__)

#: Bytes of a callback that stands in its join, which is written twice a shard or more, and charged by its size.
_CALLBACK = 16 * 2**10
#: Seconds for which whoever completed a chord may be publishing its callback.
_PUBLISHING = 60.0
_POLICIES = ("all", "any", "always")


class DynamoBackend(DynamoResults):
    """A drop-in for any app made by `create_app`."""

    @property
    def _chord_states(self) -> ChordStates:
        return ChordStates(dynamo=self._dynamo, table=self._table, retention=self._retention)

    # -- parts of chords: what they return is stored though their tasks ignore it, where the callback needs it

    def mark_as_done(
        self, task_id: Any, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Store the result, and note the part. Raises `ResultNotRecorded`."""
        is_stored = store_result and not getattr(request, "ignore_result", False)
        with _recording_errors():
            if not is_stored and request and request.chord and _wants_results(maybe_signature(request.chord)):
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
        """Store the failure, and note the part; it is no failure where the message comes again. Raises `ResultNotRecorded`."""
        if comes_again(exc) and self._is_acknowledged_late(request):
            return
        with _recording_errors():
            super().mark_as_failure(task_id, exc, traceback, request, store_result or _is_part(request), **kwargs)

    def _is_acknowledged_late(self, request: Any) -> bool:
        """Whether a task's message is still there when the task has ended."""
        task = self.app.tasks.get(getattr(request, "task", None))
        return task is None or bool(task.acks_late)

    def mark_as_retry(self, task_id: Any, exc: Any, *args: Any, **kwargs: Any) -> None:
        """Store the state, where that can be done: the message of the next try is sent already."""
        try:
            super().mark_as_retry(task_id, exc, *args, **kwargs)
        except ResultNotRecorded as error:
            logger.warning("task %s is tried again, but its state could not be stored: %s", task_id, error)

    def mark_as_revoked(
        self, task_id: Any, reason: str = "", request: Any = None, store_result: bool = True, **kwargs: Any
    ) -> None:
        """Store the state, and note the part."""
        super().mark_as_revoked(task_id, reason, request, store_result or _is_part(request), **kwargs)

    def _fail_chain(self, chain: Any, exc: Any, *args: Any, **kwargs: Any) -> None:
        """Fail the tasks of a chain's group too, and note the part that a chain is also where Celery does not.

        Celery 5.7 takes a part whose result is a failure for one that was noted, but its worker may have died in between.
        Each part is noted once: a second note could find the chord complete while another worker is failing its body.
        """
        tasks = chain if isinstance(chain, list | tuple) else ()
        following = [maybe_signature(task, app=self.app) for task in tasks]
        taken_for_noted = [task for task in following if self._has_failed(task)]
        super()._fail_chain(chain, exc, *args, **kwargs)
        for task in following:
            if isinstance(task, CeleryGroup) and (task in taken_for_noted or not task.options.get("chord")):
                self._return_group(task.tasks, exc)
            elif task in taken_for_noted:
                self._return_failed(task, exc)

    def _has_failed(self, task: Any) -> bool:
        """Whether a chord's part has the state of one that failed."""
        ends = list(_ends(task, self.app))
        if not any(end.options.get("chord") for end in ends):
            return False
        whose = [task] if isinstance(task, CeleryGroup) else ends
        return any(self.get_state(one.options["task_id"]) in states.PROPAGATE_STATES for one in whose)

    def _store_result(self, *args: Any, **kwargs: Any) -> Any:
        with _recording_errors():
            return super()._store_result(*args, **kwargs)

    # -- chords

    def apply_chord(self, header_result_args: Any, body: Any, **_: Any) -> None:
        """Remember a chord's callback before any of its parts is published."""
        group, results = header_result_args
        if _policy(body) not in _POLICIES:
            raise ImproperlyConfigured(f"join={_policy(body)!r}: expected one of {', '.join(_POLICIES)}")
        nested = not isinstance(results, CeleryGenerated) and any(isinstance(one, GroupResult) for one in results)
        if nested:
            self.app.GroupResult(group, results).save(backend=self)
        callback = self._placed(bytes_to_str(self.encode(body)), "callback", inline=_CALLBACK)
        self._chord_states.open(group, nested=nested, **callback)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Remember how many parts there are; Celery says so before it publishes the last."""
        if chord_size > 0:
            self._chord_states.resize(group_id, chord_size)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Wait for one more part."""
        self._chord_states.extend(chord_id, result.id)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:
        """Note that a part returned; the part that completes the set publishes the callback."""
        join_id = request.group
        if getattr(request, "subtask_type", None) == "group":
            self._return_group(request.kwargs["tasks"], result)
            return
        if not join_id or not request.id:
            return
        try:
            part = Part(request.group_index or 0, request.id)
            chord_state = self._chord_states.record_part(join_id, part, ok=state == states.SUCCESS)
        except ConditionFailed:
            logger.error("chord %s: part %s returned after the chord's record had expired", join_id, request.id)  # noqa: TRY400
            return
        if chord_state.complete:
            self._conclude(join_id, request.chord, chord_state)

    def _return_group(self, tasks: Iterable[Any], exc: Any) -> None:
        """Fail the tasks of a group that ends a chain, and never came to be as the chain failed before: each is a part."""
        group = CeleryGroup(tasks, app=self.app)
        for end in _ends(group, self.app):
            self.store_result(end.options["task_id"], exc, states.FAILURE)
        self._return_failed(group, exc)

    def repair(self, *, now: float | None = None) -> list[str]:
        """Publish the callbacks of chords that have been complete for a minute; returns the chords' group ids.

        This is for chords whose last part's worker died before it had published the callback, and whose message does not
        come again. Workers call it (`repairing`). One chord's failure is logged and keeps no other from being repaired.
        """
        now = time.time() if now is None else now
        return [join_id for join_id in self._chord_states.undispatched(now) if self._repaired(join_id, now)]

    def _repaired(self, join_id: str, now: float) -> bool:
        try:
            chord_state = self._chord_states.read(join_id, now)
            if chord_state is None or not chord_state.complete or chord_state.at > now - _PUBLISHING:
                return False
            self._conclude(join_id, self.decode(self._text(chord_state.given, "callback")), chord_state)
        except Exception:
            logger.exception("chord %s could not be repaired", join_id)
            return False
        return True

    def _conclude(self, join_id: str, chord: Any, chord_state: ChordState) -> None:
        callback = signature(chord, app=self.app).clone()
        policy = _policy(callback)
        for options in (callback.options, _first(callback).options):
            options.pop("join", None)
        if chord_state.dispatched != "success":
            self._dispatch(join_id, callback, chord_state, policy)

    def _dispatch(self, join_id: str, callback: Any, chord_state: ChordState, policy: str) -> None:
        """Publish the callback, then note it: in this order a crash repeats the callback and never loses it."""
        try:
            self._publish(callback, self._arguments(join_id, callback, chord_state, policy))
        except ChordError as error:
            if chord_state.dispatched:
                return
            self._fail(callback, error)
            self._chord_states.mark_dispatched(join_id, "failure")
        else:
            self._chord_states.mark_dispatched(join_id, "success")

    @staticmethod
    def _publish(callback: Any, results: list[Any]) -> None:
        """Raises `ChordError` where the callback's message is none that SQS takes; what may pass is raised as it is."""
        try:
            callback.delay(results)
        except Unsent as error:
            if not error.is_refused:
                raise
            raise ChordError(f"Callback error: {error!r}") from error
        except (EncodeError, InvalidRequest, RequestRejected) as error:
            raise ChordError(f"Callback error: {error!r}") from error

    def _arguments(self, join_id: str, callback: Any, chord_state: ChordState, policy: str) -> list[Any]:
        """What the callback is given: the parts' results in their order. Raises `ChordError` where the chord has failed."""
        wants = _wants_results(callback)
        if chord_state.clean and not wants:
            return []
        returned = self._chord_states.returned(join_id)
        if returned.failed and (policy == "all" or (policy == "any" and not returned.succeeded)):
            raise self._error(returned.failed[0])
        if not wants:
            return []
        parts = returned.succeeded if policy == "any" else returned.parts
        metas = self.metas([part.id for part in parts])
        values = {part.id: _value(part.id, metas) for part in parts}
        if chord_state.given.get("nested"):
            return _shaped(self.restore_group(join_id, cache=False), values, whole=policy != "any")
        return list(values.values())

    def _error(self, part: Part) -> ChordError:
        meta = self.metas([part.id]).get(part.id)
        cause = self.meta_from_decoded(meta)["result"] if meta else None
        error = ChordError(f"Dependency {part.id} raised {cause!r}")
        if isinstance(cause, Exception):
            error.__cause__ = cause
        return error

    def _fail(self, callback: Any, error: ChordError) -> None:
        """Fail a callback, call its errbacks, and return the parts of other chords that it would have been."""
        while isinstance(callback, CeleryChord):  # its result is that of its body
            body = maybe_signature(callback.body, app=self.app)
            body.extend_list_option("link_error", callback.options.get("link_error", []))
            body.options.setdefault("chain", callback.options.get("chain"))
            callback = body
        self.chord_error_from_stack(callback, error)
        self._return_failed(callback, error)

    def _return_failed(self, task: Any, exc: Any) -> None:
        """Note the parts of chords that a signature is, which will not run."""
        for end in _ends(task, self.app):
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
    """Tell failures to note how a task ended from the task's own."""
    try:
        yield
    except (Unavailable, DeploymentBroken) as error:
        raise ResultNotRecorded(str(error)) from error
    except Unsent as error:
        if error.is_refused:
            raise
        raise ResultNotRecorded(str(error)) from error


def _policy(callback: Any) -> str:
    return str(callback.options.get("join") or _first(callback).options.get("join") or _POLICIES[0])


def _first(callback: Any) -> Any:
    """The task that a chain begins with: what was a chord's body may have become one."""
    return maybe_signature(callback.tasks[0]) if isinstance(callback, CeleryChain) and callback.tasks else callback


def _wants_results(callback: Any) -> bool:
    """Whether the callback takes the parts' results; of a chain its first task decides, of a group or a header any."""
    if isinstance(callback, CeleryChain):
        return bool(callback.tasks) and _wants_results(_first(callback))
    if isinstance(callback, CeleryChord):
        header = callback.tasks.tasks if isinstance(callback.tasks, CeleryGroup) else callback.tasks
        return any(_wants_results(maybe_signature(task)) for task in header)
    if isinstance(callback, CeleryGroup):
        return any(_wants_results(maybe_signature(task)) for task in callback.tasks)
    return not callback.immutable


def _ends(signature: Any, app: Any) -> Iterator[Any]:
    """The tasks with which a signature ends: of a chain the last, of a group each, of a chord its body's."""
    inner: Iterable[Any] = ()
    if isinstance(signature, CeleryChord):
        inner = [signature.body]
    elif isinstance(signature, CeleryGroup):
        inner = signature.tasks
    elif isinstance(signature, CeleryChain):
        inner = signature.tasks[-1:]
    else:
        yield signature
    for task in inner:
        yield from _ends(maybe_signature(task, app=app), app)


def _is_part(request: Any) -> bool:
    """Whether a task is a chord's part, or of a chain that is one."""
    chain = getattr(request, "chain", None)
    ends = chain if isinstance(chain, list | tuple) else ()
    return bool(getattr(request, "chord", None) or any(task["options"].get("chord") for task in ends))


def _value(part: str, metas: Mapping[str, Mapping[str, Any]]) -> Any:
    """A part's result, or its failure as data."""
    meta = metas.get(part)
    if meta is None:
        raise ChordError(f"Dependency {part}: its result has expired")
    if meta["status"] == states.SUCCESS:
        return meta["result"]
    return {"task_id": part, "status": meta["status"], **meta["result"]}


def _shaped(result: Any, values: Mapping[str, Any], *, whole: bool) -> list[Any]:
    """The values in the lists that a header's groups make of them; `whole` where none may be missing."""
    missing = [one.id for one in result.results if not isinstance(one, GroupResult) and one.id not in values]
    if whole and missing:
        raise ChordError(f"Dependency {missing[0]}: it is not known to have returned")
    return [
        _shaped(one, values, whole=whole) if isinstance(one, GroupResult) else values[one.id]
        for one in result.results
        if isinstance(one, GroupResult) or one.id in values
    ]
