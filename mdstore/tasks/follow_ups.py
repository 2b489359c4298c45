"""Requests as follow-ups: in callbacks, in later tasks of a chain, and in the bodies of chords.

A worker sends the follow-ups of a message with its own rights. So the producer stores the operations of a follow-up, and
sends a reference to them. Workers refuse a message whose follow-ups reach the data store's tasks with anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mdstore.errors import InvalidRequest
from mdstore.model import Reference
from mdstore.queue.broker.canvas import signatures
from mdstore.tasks.ingest import fairness_options

if TYPE_CHECKING:
    from mdstore.tasks.ingest import IngestTask


def is_by_reference(signature: Mapping[str, Any]) -> bool:
    """Return whether a signature of one of the data store's tasks names its request by a reference, and takes no result."""
    try:
        msgspec.convert(signature["args"][0], Reference)
    except (LookupError, TypeError, msgspec.ValidationError):
        return False
    return bool(signature.get("immutable"))


def by_reference(canvas: Any, ingest: IngestTask) -> Any:
    """Return a canvas in which each signature of `ingest` has a reference instead of operations, which this stores.

    Raises `InvalidRequest` for a signature whose operations are to be the result of another task, and the errors of
    `Ingestor.prepare`.
    """
    found = _with_operations(canvas, ingest)
    if any(not signature["options"].get("task_id") for signature in found):
        # Each use of a signature without an id is another request, so the caller's signature must stay as it is.
        canvas = _copied(canvas)
        found = _with_operations(canvas, ingest)
    for signature in found:
        _store_operations(signature, ingest)
    return canvas


def _with_operations(canvas: Any, ingest: IngestTask) -> list[Any]:
    found = (one for one in signatures(canvas) if one["task"] == ingest.name and "options" in one)
    return [one for one in found if not is_by_reference(one)]


def _copied(canvas: Any) -> Any:
    if isinstance(canvas, Mapping):
        return {name: _copied(value) for name, value in canvas.items()}
    if isinstance(canvas, Sequence) and not isinstance(canvas, str | bytes):
        return [_copied(value) for value in canvas]
    return canvas


def _store_operations(signature: Any, ingest: IngestTask) -> None:
    """Store the operations of a signature, and change it to one with a reference to them."""
    options = signature["options"]
    if not (signature["immutable"] and signature["args"]) or options.get("expires") is not None:
        expected = "ingest.si(operations), without an expiry; a task whose result is to be ingested calls mdstore.submit itself"
        raise InvalidRequest(field="ingest", value="a follow-up of another task", expected=expected)
    kwargs = {**signature["kwargs"], "request_id": signature["kwargs"].get("request_id") or options.get("task_id")}
    reference = ingest.store.ingestor.prepare(*signature["args"], **kwargs)
    signature.update(args=[msgspec.to_builtins(reference)], kwargs={})
    options.setdefault("task_id", reference.request_id)
    options.update(fairness_options(reference))
