"""Find the signatures in a canvas: what runs after a task (callbacks, error callbacks, chain and chord)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: The parts of a canvas in the body of a message.
PARTS = ("callbacks", "errbacks", "chain", "chord")


def signatures(canvas: Any) -> Iterator[Any]:
    """Yield every signature in a canvas at any depth, even where Celery would not look for one.

    An object counts as a signature if it names a task.
    """
    left = [canvas]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            if "task" in value:
                yield value
            left.extend(value.values())
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            left.extend(value)
