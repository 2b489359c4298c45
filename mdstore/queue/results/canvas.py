"""Helpers for Celery's canvas: which tasks a signature starts and ends with, and what a chord's callback takes.

`maybe_signature` turns a signature from a message into one of Celery's classes (`_chain`, `_chord`, `group`, `Signature`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from celery.canvas import _chain as CeleryChain  # noqa: N812  Celery's class of chains has a private name
from celery.canvas import _chord as CeleryChord  # noqa: N812
from celery.canvas import group as CeleryGroup  # noqa: N812  Celery's class of groups has a function's name
from celery.canvas import maybe_signature

#: The values of a body's option `join`, the default first; `mdstore.queue.results.backend` explains them.
JOIN_POLICIES = ("all", "any", "always")


def join_policy(callback: Any) -> str:
    """Return the option `join` of a chord's callback, unchecked, or the default."""
    return str(callback.options.get("join") or first_task(callback).options.get("join") or JOIN_POLICIES[0])


def first_task(callback: Any) -> Any:
    """Return the first task of a chain, and any other signature unchanged.

    Celery may have turned a chord's body into a chain that starts with it.
    """
    return maybe_signature(callback.tasks[0]) if isinstance(callback, CeleryChain) and callback.tasks else callback


def final_tasks(signature: Any, app: Any) -> Iterator[Any]:
    """Yield the tasks that a signature ends with.

    A chain ends with its last task, a group with each of its tasks, and a chord with its body.
    """
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
        yield from final_tasks(maybe_signature(task, app=app), app)


def wants_results(callback: Any) -> bool:
    """Return whether a callback takes the results of the parts as its argument.

    A task does unless its signature is immutable. The first task decides for a chain, any task for a group, and any task of
    the header for a chord.
    """
    if isinstance(callback, CeleryChain):
        return bool(callback.tasks) and wants_results(first_task(callback))
    if isinstance(callback, CeleryChord):
        header = callback.tasks.tasks if isinstance(callback.tasks, CeleryGroup) else callback.tasks
        return any(wants_results(maybe_signature(task)) for task in header)
    if isinstance(callback, CeleryGroup):
        return any(wants_results(maybe_signature(task)) for task in callback.tasks)
    return not callback.immutable


def is_chord_part(request: Any) -> bool:
    """Return whether a task is a chord's part, or belongs to a chain that is one. `request` is Celery's."""
    chain = getattr(request, "chain", None)
    following = chain if isinstance(chain, list | tuple) else ()
    return bool(getattr(request, "chord", None) or any(task["options"].get("chord") for task in following))
