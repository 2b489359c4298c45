"""A frozen chord keeps its ids, and may be applied again."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chord

from mdstore.errors import ResultNotRecorded, Unavailable
from mdstore.queue.results.chord_state import ChordStates
from tests.unit.canvas import Canvas


def frozen(canvas: Canvas, parts: int = 5) -> Any:
    """A chord whose ids are fixed."""
    made = chord([canvas.s("part", number) for number in range(parts)], canvas.s("body"), app=canvas.app)
    made.freeze()
    return made


def run(canvas: Canvas, messages: list[Any]) -> list[Any]:
    """Return the results that the body gets, each time that it is sent."""
    for message in messages:
        canvas.succeed(message, message.args[0] * 10)
    return [body.args[0] for body in canvas.take("body")]


EXPECTED = [0, 10, 20, 30, 40]


def test_a_body_runs_as_often_as_its_frozen_chord_is_applied() -> None:
    canvas = Canvas()
    made = frozen(canvas)
    for _ in range(3):
        made.apply_async()
    messages = canvas.take("part")
    assert len(messages) == 15
    assert run(canvas, messages) == [EXPECTED] * 3
    assert run(canvas, messages) == []  # duplicates


def test_a_chord_that_is_done_begins_anew() -> None:
    """Its body waits for all parts of the new run."""
    canvas = Canvas()
    made = frozen(canvas)
    for _ in range(3):
        made.apply_async()
        messages = canvas.take("part")
        assert run(canvas, messages[:-1]) == []
        assert run(canvas, [*messages[-1:], *messages]) == [EXPECTED]


def test_an_application_during_the_dispatch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = Canvas()
    made = frozen(canvas)
    made.apply_async()
    backend, publish = canvas.backend, canvas.backend._publish

    def applied_meanwhile(*args: Any) -> None:
        publish(*args)
        monkeypatch.setattr(backend, "_publish", publish)
        made.apply_async()

    monkeypatch.setattr(backend, "_publish", applied_meanwhile)
    assert run(canvas, canvas.take("part")) == [EXPECTED] * 2


def test_a_duplicate_of_the_task_that_applies_a_chord_is_no_further_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the second dispatch of a callback that is a chord itself, after a worker died before it could record the first."""
    canvas = Canvas()
    inner = chord([canvas.s("part", 7, immutable=True)], canvas.s("body"), app=canvas.app)
    chord([canvas.s("first")], inner, app=canvas.app).apply_async()
    (first,) = canvas.take("first")
    mark, calls = ChordStates.mark_dispatched, iter([True])

    def dies_once(*args: Any) -> int:
        if next(calls, False):
            raise Unavailable("away", code="Test")
        return mark(*args)

    monkeypatch.setattr(ChordStates, "mark_dispatched", dies_once)
    with pytest.raises(ResultNotRecorded):
        canvas.succeed(first, 1)
    canvas.succeed(first, 1)
    parts = canvas.take("part")
    assert len(parts) == 2
    assert run(canvas, parts) == [[70]]
