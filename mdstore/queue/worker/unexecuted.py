"""Fail a task whose message no worker can execute, so that everyone who waits for its result, chain or chord is told.

Anyone who may send to the queue may name any task id in such a message. So the failure is provisional: it never replaces the
task's own end, which replaces it. If the task has ended, nothing is recorded, and no error callback is called.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
from celery.app.task import Context
from celery.utils.log import get_logger

from mdstore.errors import DeploymentBroken, IntegrityError, ResultNotRecorded, Unavailable
from mdstore.queue.broker.ascii_json import Decoder
from mdstore.queue.broker.canvas import PARTS
from mdstore.queue.broker.claim_check import is_claim, read_claim
from mdstore.queue.broker.envelope import Index, Malformed, Name, is_unicode

logger = get_logger(__name__)

_decode = Decoder[Any]().decode
_FAILURES = (ValueError, TypeError, LookupError, RecursionError)


def fail_text(app: Any, text: str, error: Exception) -> None:
    """Fail the task that a received message or claim names. Do nothing if it names none. Raises what `fail_message` raises."""
    try:
        if is_claim(text):
            claim = read_claim(text)
            envelope: dict[str, Any] = {"headers": {"task": claim.task, "id": claim.id}}
        else:
            envelope = _decode(text)
        headers, body, properties = (envelope.get(name) for name in ("headers", "body", "properties"))
    except (*_FAILURES, AttributeError, IntegrityError):
        return
    properties = properties if isinstance(properties, dict) else {}
    if properties.get("body_encoding") == "base64":
        with suppress(*_FAILURES):
            body = b64decode(body or "")
    fail_message(app, headers, body, properties, error)


def fail_message(app: Any, headers: Any, body: Any, properties: Mapping[str, Any], error: Exception) -> None:
    """Store the failure of a message's task, fail its chain and chord, and call its error callbacks.

    Only valid fields of the message are used. Raises `ResultNotRecorded`, `Unavailable` or `DeploymentBroken`.
    """
    names = {name: _valid(headers, name, Name) for name in ("id", "task", "root_id", "parent_id", "group")}
    if not names["id"] or not names["task"]:
        return
    index = _valid(headers, "group_index", Index)
    canvas = _canvas(body)
    try:
        app.admit(names["task"], canvas)
    except Malformed:
        canvas = dict.fromkeys(PARTS)
    if canvas["chord"] and (index is None or not names["group"]):
        canvas["chord"] = None
    request = Context(
        names,
        group_index=index,
        correlation_id=properties.get("correlation_id"),
        reply_to=properties.get("reply_to"),
        delivery_info=properties.get("delivery_info") or {},
        **canvas,
    )
    backend = app.backend  # only this project's backend stores provisional failures
    record = getattr(backend, "mark_as_refused", backend.mark_as_failure)
    try:
        if record(names["id"], error, request=request) is False:
            logger.warning("task %s has ended, and a message with its id is refused: %s", names["id"], error)
    except (ResultNotRecorded, Unavailable, DeploymentBroken):
        raise
    except Exception:  # the message's callbacks may be anything
        logger.exception(
            "task %s has failed (%s), but not everything that depends on it could be notified", names["id"], error
        )


def _valid(headers: Any, name: str, kind: Any) -> Any:
    """Return a header if it is of a kind, else None."""
    try:
        value = msgspec.convert(headers[name], kind)
    except (*_FAILURES, msgspec.ValidationError):
        return None
    return value if not isinstance(value, str) or is_unicode(value) else None


def _canvas(body: Any) -> dict[str, Any]:
    """Return what runs after a task (callbacks, chain, chord), from its message's body."""
    try:
        canvas = json.loads(body)[2]  # not msgspec, which refuses NaN
        known = {name: canvas.get(name) for name in PARTS}
    except (*_FAILURES, AttributeError):
        known = {}
    kinds = {"chord": dict, "chain": list, "callbacks": list, "errbacks": list}
    return {name: known[name] if isinstance(known.get(name), kind) else None for name, kind in kinds.items()}
