"""The result backend: chords as Celery's canvas makes them, over an in-memory table, message by message."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from celery import VERSION as celery_version  # noqa: N811
from celery import chain, chord, group
from celery.backends.cache import CacheBackend
from celery.exceptions import ChordError, ImproperlyConfigured
from celery.result import ResultSet
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.exceptions import EncodeError

from mdstore.queue.results.chord_state import ChordStates
from tests.unit.canvas import Canvas
from tests.unit.fake_results_table import Killed


def published(canvas: Canvas, header: list[Any], body: Any) -> tuple[list[Any], Any]:
    """Publish a chord, and return its parts' messages and its result."""
    result = chord(header, body, app=canvas.app).apply_async()
    return canvas.take("part"), result


def parts_of(canvas: Canvas, count: int) -> list[Any]:
    """Return the signatures of `count` parts."""
    return [canvas.s("part", number) for number in range(count)]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 2))
def test_two_deliveries_of_each_part_in_any_order_with_crashes_complete_the_chord(
    data: st.DataObject, size: int, kills: int
) -> None:
    """The callback gets every part's result, under one task id. The chord fails only if some part never succeeded.

    The outcomes of a part's two deliveries may differ, and workers may be killed before any of their calls.
    """
    canvas = Canvas()
    messages, result = published(canvas, parts_of(canvas, size), canvas.s("body"))
    outcomes = [data.draw(st.lists(st.booleans(), min_size=2, max_size=2)) for _ in range(size)]
    queue = data.draw(st.permutations([(number, ok) for number in range(size) for ok in outcomes[number]]))
    remaining = itertools.count(kills, -1)

    def kill(_: str) -> None:
        if kills and next(remaining) > 0 and data.draw(st.integers(0, 4)) == 0:
            raise Killed

    canvas.table.before_call = kill
    while queue:
        number, ok = queue[0]
        try:
            if ok:
                canvas.succeed(messages[number], number * 10)
            else:
                canvas.fail(messages[number], ValueError(number))
        except Killed:
            continue  # SQS delivers it again
        queue = queue[1:]

    canvas.table.before_call = lambda _: None
    bodies = canvas.take("body")
    assert {body.task_id for body in bodies} <= {result.id}
    if all(any(one) for one in outcomes):
        assert [body.args for body in bodies] == [[[number * 10 for number in range(size)]]] * len(bodies)
        assert bodies
        if not kills:
            assert len(bodies) == 1
    else:
        assert not bodies
        assert result.state == "FAILURE"


def test_the_first_failure_fails_the_body_once() -> None:
    """The body's result is a ChordError that names the part's exception. Duplicate deliveries do not call the errback again."""
    canvas = Canvas()
    body = canvas.s("body")
    body.link_error(canvas.s("errback"))
    messages, result = published(canvas, parts_of(canvas, 3), body)
    for _ in range(2):
        canvas.succeed(messages[0], 1)
        canvas.fail(messages[2], KeyError("third"))
        assert not canvas.take("errback") or result.state == "FAILURE"
        canvas.fail(messages[1], ValueError("second"))
    assert [message.task for message in canvas.published].count("errback") == 1
    assert isinstance(result.result, ChordError)
    assert str(result.result) == f"Dependency {messages[1].task_id} raised ValueError('second')"


def test_a_failed_chord_runs_once_its_failed_part_succeeds() -> None:
    """When the failed part's message is delivered again and succeeds, the body runs with its result, under the same id."""
    canvas = Canvas()
    messages, result = published(canvas, parts_of(canvas, 2), canvas.s("body"))
    canvas.fail(messages[0], ValueError("no"))
    canvas.succeed(messages[1], 2)
    assert result.state == "FAILURE"
    canvas.succeed(messages[0], 1)
    (body,) = canvas.take("body")
    assert (body.task_id, body.args) == (result.id, [[1, 2]])


@pytest.mark.parametrize(
    ("policy", "outcomes", "expected_arguments"),
    [
        ("all", "ok ok", [[0, 1]]),
        ("all", "ok no", None),
        ("any", "ok ok", [[0, 1]]),
        ("any", "no ok", [[1]]),
        ("any", "no no", None),
        ("always", "ok no", [[0, {"exc_type": "ValueError", "exc_module": "builtins", "exc_message": [1]}]]),
        ("always", "no no", [[{"exc_type": "ValueError", "exc_message": [0]}, {"exc_message": [1]}]]),
    ],
)
@pytest.mark.parametrize("set_on", ["body", "chord", "chain"])
def test_the_join_policy_decides_when_the_body_runs(
    policy: str, outcomes: str, expected_arguments: Any, set_on: str
) -> None:
    """The policy may be set on the body, on the chord or on the body of a chord in a chain; it is not sent with the body."""
    canvas = Canvas()
    body = canvas.s("body")
    if set_on != "chord":
        body.set(join=policy)
    made = chord(parts_of(canvas, 2), body, app=canvas.app)
    if set_on == "chord":
        made.set(join=policy)
    result = (made | canvas.s("after") if set_on == "chain" else made).apply_async()
    for number, (message, outcome) in enumerate(zip(canvas.take("part"), outcomes.split(), strict=True)):
        if outcome == "ok":
            canvas.succeed(message, number)
        else:
            canvas.fail(message, ValueError(number))
    bodies = canvas.take("body")
    if expected_arguments is None:
        assert not bodies
        assert result.state == "FAILURE"
        return
    (sent,) = bodies
    assert "join" not in vars(sent)
    (values,) = sent.args
    for value, expected in zip(values, expected_arguments[0], strict=True):
        if isinstance(expected, dict):
            assert expected.items() <= value.items()
            assert value["status"] == "FAILURE"
        else:
            assert value == expected


def test_an_unknown_join_policy_is_refused_when_the_chord_is_applied() -> None:
    """It is refused before anything is published."""
    canvas = Canvas()
    with pytest.raises(ImproperlyConfigured, match="sometimes"):
        published(canvas, parts_of(canvas, 2), canvas.s("body", join="sometimes"))
    assert not canvas.published


@pytest.mark.parametrize("policy", ["all", "any", "always"])
def test_an_immutable_body_gets_no_results_and_none_are_read(policy: str) -> None:
    """Parts that ignore their results cost one call each."""
    canvas = Canvas("mdstore.queue.results.backend:DynamoBackend")
    body = canvas.s("body", 7, immutable=True, join=policy)
    messages, _ = published(canvas, parts_of(canvas, 50), body)
    canvas.table.calls.clear()
    for message in messages:
        canvas.succeed(message, "ignored", ignore_result=True)
    (sent,) = canvas.take("body")
    assert sent.args == [7]
    assert canvas.table.calls == ["UpdateItem"] * 53


def test_an_ignored_result_is_stored_if_the_body_needs_it() -> None:
    """A failure is stored too, so that the chord's error can name it."""
    canvas = Canvas()
    messages, _ = published(canvas, parts_of(canvas, 2), canvas.s("body", join="always"))
    canvas.succeed(messages[0], 5, ignore_result=True)
    canvas.fail(messages[1], ValueError("no"), ignore_result=True)
    ((five, failure),) = canvas.take("body")[0].args
    assert (five, failure["exc_message"]) == (5, ["no"])


def test_a_generated_header_is_published_part_by_part() -> None:
    """Parts are published while later ones are generated; the size is known only just before the last part is published."""
    canvas = Canvas()
    seen: list[int] = []

    def header() -> Any:
        for number in range(5):
            seen.append(len(canvas.published))
            yield canvas.s("part", number)

    chord(header(), canvas.s("body"), app=canvas.app).apply_async()
    assert seen == [0, 0, 0, 1, 1]  # Celery generates two parts ahead, and more the first time
    for number, message in enumerate(canvas.take("part")):
        canvas.succeed(message, number)
    assert canvas.take("body")[0].args == [[0, 1, 2, 3, 4]]


def deliver_all(canvas: Canvas) -> None:
    """Deliver everything but bodies, in reverse order and again in order. Each task returns its last argument."""
    while waiting := [message for message in canvas.sent if message.task != "body"]:
        canvas.sent = [message for message in canvas.sent if message.task == "body"]
        for message in [*reversed(waiting), *waiting]:
            canvas.succeed(message, message.args[-1])


def test_chords_may_contain_other_canvases() -> None:
    """A chain, chord or group may be a part, although Celery gives each its own notion of a group and an index."""
    canvas = Canvas()
    s = canvas.s
    part = s("part", 0)
    headers: dict[str, tuple[list[Any], Any]] = {
        "a chain": ([s("p", 1), chain(s("p", 2), s("p", 3))], [1, 3]),
        "a chord": ([s("p", 1), chord([s("p", 2), s("p", 3)], s("p", 4), app=canvas.app)], [1, 4]),
        "a chord whose body is a group": (
            [chord([s("p", 2), s("p", 3)], group([s("p", 4), s("p", 5)], app=canvas.app), app=canvas.app), s("p", 1)],
            [[4, 5], 1],
        ),
        "a chain that ends in a group": (
            [s("p", 1), chain(s("p", 2), group([s("p", number) for number in range(6)], app=canvas.app))],
            [1, [0, 1, 2, 3, 4, 5]],
        ),
        "a chain that ends in a generated group": (
            [s("p", 1), chain(s("p", 2), group((s("p", number) for number in range(6)), app=canvas.app))],
            [1, [0, 1, 2, 3, 4, 5]],
        ),
        "a chord that is a chord's body": (
            [s("p", 1), chord([part, part], chord([s("p", 6), s("p", 7)], s("p", 8), app=canvas.app), app=canvas.app)],
            [1, 8],
        ),
    }
    for name, (header, expected) in headers.items():
        chord(header, s("body"), app=canvas.app).apply_async()
        deliver_all(canvas)
        bodies = canvas.take("body")
        assert {str(body.args) for body in bodies} == {str([expected])}, name
        assert len({body.task_id for body in bodies}) == 1, name


def test_a_group_in_a_header_is_flattened_in_celerys_order() -> None:
    """Each task of the group is a part, and the group itself is not."""
    canvas = Canvas()
    header = [canvas.s("p", 1), group([canvas.s("p", 2), canvas.s("p", 3)], app=canvas.app)]
    chord(header, canvas.s("body"), app=canvas.app).apply_async()
    order = [message.args[0] for message in canvas.published]
    deliver_all(canvas)
    assert canvas.take("body")[0].args == [order]


@pytest.mark.parametrize("is_redelivered", [False, True], ids=["once", "after a crash"])
def test_a_chain_that_fails_is_a_failed_part(is_redelivered: bool) -> None:
    """This holds even if the worker died after it stored the chain's result and before it recorded the part."""
    canvas = Canvas()
    header = [canvas.s("p", 1), chain(canvas.s("first"), canvas.s("p", 3))]
    result = chord(header, canvas.s("body"), app=canvas.app).apply_async()
    (first,) = canvas.take("first")
    if is_redelivered:

        def kill(operation: str) -> None:
            if operation == "UpdateItem":  # the chain's result is stored, the part is not recorded yet
                raise Killed

        canvas.table.before_call = kill
        with pytest.raises(Killed):
            canvas.fail(first, ValueError("broken"))
        canvas.table.before_call = lambda _: None
    deliver_all(canvas)
    assert result.state == "PENDING"
    canvas.table.calls.clear()
    canvas.fail(first, ValueError("broken"))
    assert canvas.table.calls.count("UpdateItem") == 4  # the part, its full shard, the claim and the dispatch
    assert result.state == "FAILURE"
    assert "broken" in str(result.result)


def test_a_chain_that_fails_before_its_group_fails_each_task_of_the_group() -> None:
    """The group's tasks will never run, so the chord does not wait for them."""
    canvas = Canvas()
    pair = group([canvas.s("p", 4), canvas.s("p", 5)], app=canvas.app)
    header = [canvas.s("p", 1), canvas.s("p", 2), chain(canvas.s("first"), pair)]
    result = chord(header, canvas.s("body"), app=canvas.app).apply_async()
    (first,) = canvas.take("first")
    canvas.fail(first, ValueError("broken"))
    one, two = canvas.take("p")
    canvas.succeed(one, 1)
    assert result.state == "PENDING"
    canvas.succeed(two, 1)
    assert result.state == "FAILURE"
    assert "broken" in str(result.result)


@pytest.mark.skipif(celery_version < (5, 7), reason="5.6 leaves the group's tasks pending")
def test_a_group_after_a_failed_task_fails() -> None:
    """A caller that waits for the group's tasks gets their failures."""
    canvas = Canvas()
    result = (canvas.s("first") | group([canvas.s("p"), canvas.s("p")], app=canvas.app)).apply_async()
    (first,) = canvas.take("first")
    canvas.fail(first, ValueError("broken"))
    assert [child.state for child in result.results] == ["FAILURE", "FAILURE"]


def test_a_failed_inner_chord_is_a_failed_part_of_the_outer_chord() -> None:
    """The inner body never runs, so the failure must be recorded for it."""
    canvas = Canvas()
    inner = chord([canvas.s("inner"), canvas.s("inner")], canvas.s("p", 1), app=canvas.app)
    outer = chord([canvas.s("p", 1), inner], canvas.s("body"), app=canvas.app).apply_async()
    one, two = canvas.take("inner")
    canvas.fail(one, ValueError("deep"))
    canvas.succeed(two, 1)
    assert outer.state == "PENDING"
    deliver_all(canvas)
    assert outer.state == "FAILURE"
    assert "deep" in str(outer.result)


def test_a_failed_chord_fails_the_last_task_of_a_chord_as_its_body() -> None:
    """In `group | group | task`, the caller holds the last task's result; it fails when the first group fails."""
    canvas = Canvas()
    made = group(parts_of(canvas, 2), app=canvas.app) | group([canvas.s("p"), canvas.s("p")], app=canvas.app)
    last = canvas.s("body")
    last.link_error(canvas.s("errback"))
    result = (made | last).apply_async()
    one, two = canvas.take("part")
    canvas.fail(one, ValueError("early"))
    canvas.succeed(two, 1)
    assert result.state == "FAILURE"
    assert len(canvas.take("errback")) == 1


def test_a_failed_chord_fails_each_task_of_a_group_as_its_body() -> None:
    """Each of them fails with the failed part's own exception, as in Celery."""
    canvas = Canvas()
    canvas.app.control.revoke = lambda *_, **__: None
    header = parts_of(canvas, 2)
    result = chord(header, group([canvas.s("p"), canvas.s("q")], app=canvas.app), app=canvas.app).apply_async()
    one, two = canvas.take("part")
    canvas.fail(one, ValueError("early"))
    canvas.succeed(two, 1)
    assert [child.state for child in result.results] == ["FAILURE", "FAILURE"]


def test_a_chord_that_replaces_a_part_counts_as_that_part() -> None:
    """The body of the replacing chord has the part's id, index and chord."""
    canvas = Canvas()
    messages, _ = published(canvas, parts_of(canvas, 3), canvas.s("body"))
    replaced = messages[1]
    inner = chord([canvas.s("p", 1), canvas.s("p", 2)], canvas.s("p", 9), app=canvas.app)
    inner.freeze(replaced.task_id)
    inner.set(chord=replaced.chord, group_id=replaced.group_id, group_index=replaced.group_index)
    inner.apply_async()
    deliver_all(canvas)
    for message in (messages[0], messages[2]):
        canvas.succeed(message, 0)
    assert canvas.take("body")[0].args == [[0, 9, 0]]


def test_a_part_may_add_parts_to_its_chord() -> None:
    """After `Task.add_to_chord`, the body waits for the added parts and gets their results."""
    canvas = Canvas()
    messages, _ = published(canvas, parts_of(canvas, 3), canvas.s("body"))
    added = canvas.s("added")
    adder = messages[1]
    added.set(group_id=adder.group_id, group_index=adder.group_index, chord=adder.chord)
    canvas.backend.add_to_chord(adder.group_id, added.freeze())
    added.delay()
    for message in messages:
        canvas.succeed(message, 1)
    assert not canvas.take("body")
    (message,) = canvas.take("added")
    canvas.succeed(message, 2)
    assert sorted(canvas.take("body")[0].args[0]) == [1, 1, 1, 2]


def test_a_revoked_part_fails_its_chord() -> None:
    """A revoked part has returned without success."""
    canvas = Canvas()
    messages, result = published(canvas, parts_of(canvas, 2), canvas.s("body"))
    canvas.succeed(messages[0], 1)
    canvas.backend.mark_as_revoked(messages[1].task_id, "stopped", request=canvas.request(messages[1]))
    assert result.state == "FAILURE"
    assert "TaskRevokedError" in str(result.result)


def completed_by_a_killed_worker(canvas: Canvas, body: Any) -> Any:
    """Publish a chord, complete it with a worker that is killed once it has recorded the last part, and return its result."""
    messages, result = published(canvas, parts_of(canvas, 3), body)
    for message in messages[:-1]:
        canvas.succeed(message, 1)

    def kill(operation: str) -> None:
        if operation == "BatchGetItem":  # the part is recorded, and the worker collects the results
            raise Killed

    canvas.table.before_call = kill
    with pytest.raises(Killed):
        canvas.succeed(messages[-1], 3)
    canvas.table.before_call = lambda _: None
    return result


@pytest.mark.parametrize("size", [1, 50_000], ids=["small", "a callback in S3"])
def test_repair_publishes_the_callback_that_a_dead_worker_left(size: int) -> None:
    """`repair` waits until the worker had time to publish, and then publishes the stored callback once."""
    canvas = Canvas()
    result = completed_by_a_killed_worker(canvas, canvas.app.signature("body", kwargs={"note": "x" * size}))
    published(canvas, parts_of(canvas, 2), canvas.s("body"))  # a chord that is not complete
    now = time.time()
    assert canvas.backend.repair(now=now) == []
    root = canvas.table.items[f"chord-join-{result.parent.id}"]
    root["look_at"] = {"N": str(int(now))}  # the last part has just returned; its worker may be publishing
    assert canvas.backend.repair(now=now) == []
    assert canvas.backend.repair(now=now + 58) == []  # it was checked a moment ago
    (repaired,) = canvas.backend.repair(now=now + 62)
    assert repaired == result.parent.id
    (body,) = canvas.take("body")
    assert (body.task_id, body.args, body.kwargs) == (result.id, [[1, 1, 3]], {"note": "x" * size})
    assert canvas.backend.repair(now=now + 1_000) == []


def test_repair_finds_a_full_shard_that_the_root_does_not_list() -> None:
    """The worker may die after it fills a shard and before it records that in the root."""
    canvas = Canvas()
    messages, _ = published(canvas, parts_of(canvas, 2), canvas.s("body"))
    canvas.succeed(messages[0], 1)
    updates = itertools.count()

    def kill(operation: str) -> None:
        if operation == "UpdateItem" and next(updates) == 1:
            raise Killed

    canvas.table.before_call = kill
    with pytest.raises(Killed):
        canvas.succeed(messages[1], 2)
    canvas.table.before_call = lambda _: None
    assert len(canvas.backend.repair(now=time.time() + 62)) == 1
    assert canvas.take("body")[0].args == [[1, 2]]


def test_a_chord_that_cannot_be_repaired_does_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other chord is repaired, and the broken one is repaired later."""
    canvas = Canvas()
    incomplete = {completed_by_a_killed_worker(canvas, canvas.s("body")).parent.id for _ in range(2)}
    broken = min(incomplete)
    read = ChordStates.read

    def failing_read(self: ChordStates, chord_id: str, now: float) -> Any:
        state = read(self, chord_id, now)
        if chord_id == broken:
            raise ValueError(chord_id)
        return state

    monkeypatch.setattr(ChordStates, "read", failing_read)
    now = time.time()
    assert set(canvas.backend.repair(now=now + 62)) == incomplete - {broken}
    monkeypatch.undo()
    assert canvas.backend.repair(now=now + 124) == [broken]


def test_a_callback_that_cannot_be_encoded_fails_the_chord(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary error is raised instead, so the part's message is redelivered and the callback is published then."""
    canvas = Canvas()
    (message,), result = published(canvas, parts_of(canvas, 1), canvas.s("body"))
    for error in (ConnectionError("gone"), EncodeError("too long")):

        def fail_to_send(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(canvas.app, "send_task", fail_to_send)
        if isinstance(error, ConnectionError):
            with pytest.raises(ConnectionError):
                canvas.succeed(message, 1)
            assert result.state == "PENDING"
        else:
            canvas.succeed(message, 1)
    assert result.state == "FAILURE"
    assert "too long" in str(result.result)


# -- results


def test_a_stored_success_is_never_overwritten() -> None:
    """Each state costs one call. A later duplicate that fails, or returns another value, changes nothing."""
    canvas = Canvas()
    for value, state in ((None, "STARTED"), (1, "SUCCESS"), (ValueError("late"), "FAILURE"), (2, "SUCCESS")):
        canvas.table.calls.clear()
        canvas.backend.store_result("t", value, state)
        assert canvas.table.calls == ["PutItem"]
    assert canvas.app.AsyncResult("t").get() == 1


def test_large_results_are_stored_in_s3() -> None:
    """Any text is read back unchanged. A result over the limit is refused before anything is stored."""
    canvas = Canvas()
    value = {"text": 'é\n"' * 100_000, "deep": [{"n": 1.5}]}
    canvas.backend.store_result("large", value, "SUCCESS")
    (key,) = canvas.objects.stored
    assert key.startswith("claims/45/")
    assert len(str(canvas.table.items["celery-task-meta-large"])) < 1_000
    assert canvas.app.AsyncResult("large").get() == value
    with pytest.raises(EncodeError, match="at most"):
        canvas.backend.store_result("huge", "x" * 2**26, "SUCCESS")


def test_groups_are_saved_restored_and_deleted() -> None:
    """A group of 10,000 results survives saving and restoring."""
    canvas = Canvas()
    results = [canvas.app.AsyncResult(f"{number:036d}") for number in range(10_000)]
    canvas.app.GroupResult("g", results).save(backend=canvas.backend)
    restored = canvas.app.GroupResult.restore("g", backend=canvas.backend)
    assert [result.id for result in restored.results] == [result.id for result in results]
    restored.delete(backend=canvas.backend)
    assert canvas.app.GroupResult.restore("g", backend=canvas.backend) is None


def test_waiting_for_a_chord_reads_its_state() -> None:
    """`get` checks twice a second whether a part has failed: it reads the shards that may have one, and raises the first error.

    With a callback, all parts are read, 100 per call.
    """
    canvas = Canvas()
    parts, result = published(canvas, parts_of(canvas, 250), canvas.s("body"))

    def calls_of_a_check() -> int:
        canvas.table.calls.clear()
        result.parent.maybe_throw()
        assert set(canvas.table.calls) <= {"BatchGetItem"}
        return len(canvas.table.calls)

    assert calls_of_a_check() == 3
    for message in parts[:240]:
        canvas.succeed(message, None)
    assert calls_of_a_check() == 2  # the root, and 5 of 125 shards
    seen: list[str] = []
    result.parent.maybe_throw(callback=lambda task_id, _: seen.append(task_id))
    assert seen == [message.task_id for message in parts]
    canvas.fail(parts[241], ValueError("on purpose"))
    with pytest.raises(ValueError, match="on purpose"):
        calls_of_a_check()
    with pytest.raises(ValueError, match="on purpose"):
        result.get(timeout=1)


def test_a_group_result_is_pickled_by_its_name_in_the_app() -> None:
    """The pickled name is an attribute of the app."""
    canvas = Canvas()
    _, (name, *_) = canvas.app.GroupResult("g", []).__reduce__()
    assert getattr(canvas.app, name) is canvas.app.GroupResult


def test_a_group_of_groups_raises_the_errors_of_its_inner_groups() -> None:
    """With `propagate=False` it raises nothing."""
    canvas = Canvas()
    inner = canvas.app.GroupResult("inner", [canvas.app.AsyncResult("t")])
    outer = canvas.app.GroupResult("outer", [inner])
    outer.maybe_throw()
    canvas.backend.store_result("t", KeyError("k"), "FAILURE")
    with pytest.raises(KeyError):
        outer.maybe_throw()
    outer.maybe_throw(propagate=False)


def test_results_outside_the_table_are_checked_by_celery() -> None:
    """A task may have a backend of its own, and a result set need not be a group."""
    canvas = Canvas()
    elsewhere = CacheBackend(canvas.app, backend="memory")
    group_result = canvas.app.GroupResult("g", [canvas.app.AsyncResult("own", backend=elsewhere)])
    group_result.maybe_throw()
    elsewhere.store_result("own", KeyError("k"), "FAILURE")
    with pytest.raises(KeyError):
        group_result.maybe_throw()
    assert canvas.table.calls == ["BatchGetItem"] * 2  # is the group a chord's header?
    canvas.backend.store_result("t", IndexError("i"), "FAILURE")
    with pytest.raises(IndexError):
        canvas.app.GroupResult("g", [ResultSet([canvas.app.AsyncResult("t")], app=canvas.app)]).maybe_throw()


def test_a_forgotten_result_is_deleted() -> None:
    """After `AsyncResult.forget`, the task is pending."""
    canvas = Canvas()
    canvas.backend.store_result("t", 1, "SUCCESS")
    canvas.app.AsyncResult("t").forget()
    assert canvas.app.AsyncResult("t").state == "PENDING"


def test_every_item_has_an_expiry_time() -> None:
    """A part's result is kept as long as its chord may wait; any other result is kept for the configured time."""
    canvas = Canvas()
    messages, _ = published(canvas, parts_of(canvas, 3), canvas.s("body"))
    for message in messages:
        canvas.succeed(message, 1)
    canvas.backend.store_result("alone", 1, "SUCCESS")
    ends = {key: int(item["ttl"]["N"]) for key, item in canvas.table.items.items()}
    alone = ends.pop("celery-task-meta-alone")
    assert len(ends) == 6
    assert min(ends.values()) - alone >= 13 * 86_400
