"""A selection of the cases of Celery's own canvas tests. docs/celery-canvas.md says how all of them end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group, states
from celery.canvas import Signature
from celery.exceptions import ChordError

from mdstore.queue.app import SqsApp
from tests.integration.scenarios import app, environ, logs, workers
from tests.waiting import until

__all__ = ["app", "environ", "logs", "workers"]  # fixtures
pytestmark = pytest.mark.usefixtures("workers")

WAIT = 30


@pytest.fixture(autouse=True)
def current(app: SqsApp) -> None:
    """Make the app current: `chain`, `group` and `chord` use the current one."""
    app.set_current()


def s(app: SqsApp, name: str, *args: Any, immutable: bool = False, **kwargs: Any) -> Signature:
    signature: Signature = app.signature(name, args, kwargs, immutable=immutable)
    return signature


def test_nested_canvases(app: SqsApp) -> None:
    """Chains of groups, groups of chains, groups before chords and empty members give the right results."""

    def add(*numbers: int) -> Signature:
        return s(app, "add", *numbers)

    total = s(app, "total")
    cases: list[tuple[Signature, Any]] = [
        (chain(add(1, 2), add(3), add(4)), 10),
        (group(add(n, n) for n in range(4)), [0, 2, 4, 6]),
        (chain(add(1, 1), group(add(1), add(2))), [3, 4]),
        (chain(add(1, 1), group(add(1), add(2)), total, add(1)), 8),
        (chain(group(add(1, 1), add(2, 2)), total, group(add(1), add(2)), total), 15),
        (chord([chain(add(1, 1), add(1)), group(add(2, 2), add(3, 3))], total), 13),
        (group(chain(add(1, 1), add(1)), chord([add(1, 1), add(2, 2)], total)), [3, 6]),
        (chord([add(1, 1), add(2, 2)], group(total, total)), [6, 6]),
        (chord([chain(), add(1, 1), chain()], total), 2),
        (chain(s(app, "spread", 1), add(1)), 3),
        (group([s(app, "nested", 1, []), add(1, 1)]), [[0, 1], 2]),
    ]
    results = [(case.apply_async(), value) for case, value in cases]
    for number, (result, value) in enumerate(results):
        assert result.get(timeout=WAIT) == value, f"case {number}"


def test_implicit_chords_run_each_step_once(app: SqsApp, tmp_path: Path) -> None:
    """Celery upgrades each of the five groups of the chain to a chord."""
    path = str(tmp_path / "notes")
    steps: list[Signature] = [s(app, "add", 1, 1)]
    for number in range(5):
        steps += [group(s(app, "add", 0), s(app, "add", 0)), s(app, "total")]
        steps[-1].link(s(app, "note", number, path=path, immutable=True))
    assert chain(*steps).apply_async().get(timeout=WAIT) == 64
    until(lambda: len(Path(path).read_text().split()) == 5)
    assert sorted(Path(path).read_text().split()) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("body", ["task", "chain", "group", "chord"])
def test_a_failed_header_fails_every_kind_of_body(app: SqsApp, body: str, tmp_path: Path) -> None:
    """The caller gets the part's error, the body does not run, and its error callback runs."""
    path = tmp_path / "notes"
    total = s(app, "total")
    bodies = {"task": total, "chain": chain(total, s(app, "add", 1)), "group": group(total, total.clone())}
    bodies["chord"] = chord([total, total.clone()], total.clone())
    canvas = chord([s(app, "add", 1, 1), s(app, "fail")], bodies[body])
    result = canvas.apply_async(link_error=s(app, "note", "called", path=str(path), immutable=True))
    with pytest.raises((ValueError, ChordError), match="on purpose"):
        result.get(timeout=WAIT)
    parts = result.results if body == "group" else [result]
    for part in parts:
        until(lambda part=part: part.state == states.FAILURE)  # type: ignore[misc]
    until(path.exists)


def test_a_failed_step_fails_the_rest_of_its_chain(app: SqsApp) -> None:
    """Whoever waits for the end gets the first error, even if the rest of the chain is a group or a chord."""
    ends = [s(app, "add", 1), group(s(app, "add", 1), s(app, "add", 2)), chord([s(app, "add", 1)], s(app, "total"))]
    for result in [chain(s(app, "add", 1, 1), s(app, "fail"), end).apply_async() for end in ends]:
        with pytest.raises(ValueError, match="on purpose"):
            result.get(timeout=WAIT)


def test_links_run_after_success_and_error_links_after_failure(app: SqsApp, tmp_path: Path) -> None:
    """Each callback runs once, for a task and for a whole chain."""
    paths = {name: tmp_path / name for name in ("good", "bad", "chain")}
    notes = {name: s(app, "note", name, path=str(path), immutable=True) for name, path in paths.items()}
    s(app, "add", 1, 1).apply_async(link=notes["good"], link_error=notes["bad"])
    s(app, "fail").apply_async(link=notes["good"], link_error=notes["bad"])
    whole = chain(s(app, "add", 1, 1), s(app, "fail"), s(app, "add", 1))
    whole.link_error(notes["chain"])
    whole.apply_async()
    until(lambda: all(path.exists() for path in paths.values()))
    assert app.send_task("add", (1, 1)).get(timeout=WAIT) == 2
    assert [path.read_text() for path in paths.values()] == ["good\n", "bad\n", "chain\n"]


def test_ids_of_parents_and_roots(app: SqsApp) -> None:
    """The first task is the root of all; each step's parent is the step before."""
    result = chain(s(app, "ids"), s(app, "ids"), s(app, "ids")).apply_async()
    second, first = result.parent, result.parent.parent
    assert result.get(timeout=WAIT) == [first.id, second.id]
    assert second.get(timeout=WAIT) == [first.id, first.id]
    assert first.get(timeout=WAIT) == [first.id, None]


def test_a_countdown_delays_the_whole_header(app: SqsApp) -> None:
    """With `apply_async(countdown=...)` of a group and its body, no part of the group runs early."""
    result = (group(s(app, "add", 1, 1), s(app, "add", 2, 2)) | s(app, "total")).apply_async(countdown=2)
    assert [part.state for part in result.parent.results] == [states.PENDING] * 2
    assert result.get(timeout=WAIT) == 6


def test_a_forgotten_result_is_gone(app: SqsApp) -> None:
    """`forget` of a chain forgets its parents too."""
    result = chain(s(app, "add", 1, 1), s(app, "add", 1)).apply_async()
    assert result.get(timeout=WAIT) == 3
    ids = [result.id, result.parent.id]
    result.forget()
    assert [app.backend.get_task_meta(one)["status"] for one in ids] == [states.PENDING] * 2
