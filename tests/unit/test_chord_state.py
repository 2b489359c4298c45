"""The chord state over an in-memory table, with deliveries repeated, reordered, concurrent and killed between two calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import count, permutations, product
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.errors import ConditionFailed
from mdstore.queue.results.chord_state import ChordState, ChordStates
from mdstore.queue.results.shard import Part
from tests.unit.fake_results_table import Killed, ResultsTable, Workers

NOW = 1_700_000_000
DAYS = 15 * 86_400


def chord_states_over(
    table: ResultsTable, *, shard: int = 200, clock: Callable[[], float] = lambda: NOW
) -> ChordStates:
    """Return chord states whose shards may be small, so that a small chord has several."""
    return ChordStates(dynamo=table, table="results", retention=DAYS, clock=clock, shard=shard)


def part(index: int, number: int | None = None) -> Part:
    """Return a part with an index; the number tells parts with the same index apart."""
    return Part(index, str(UUID(int=index if number is None else 1_000 + number)))


def opened(table: ResultsTable, size: int, *, shard: int = 200) -> ChordStates:
    """Return chord states that hold the chord "c", all of whose parts are published."""
    chord_states = chord_states_over(table, shard=shard)
    chord_states.open("c", callback="{}")
    chord_states.resize("c", size)
    return chord_states


class History:
    """Runs one chord, and records what was dispatched. A delivery does what the backend does."""

    def __init__(self, *, shard: int, choose: Callable[[int], int], dies: Callable[[], bool], redelivers: bool) -> None:
        self.table = ResultsTable()
        self.chord_states = chord_states_over(self.table, shard=shard)
        self.workers = Workers(choose, dies)
        self.table.before_call = self.workers.checkpoint
        self.published: list[str] = []
        self.kills = 0
        self._redelivers = redelivers

    def deliver(self, one: Part, *, ok: bool) -> None:
        """Send a part's message; it is delivered again if its worker is killed."""

        def done(killed: bool) -> None:
            self.kills += killed
            if killed and self._redelivers:
                self.deliver(one, ok=ok)

        self.workers.start(lambda: self.dispatch(self.chord_states.record_part("c", one, ok=ok)), done=done)

    def dispatch(self, state: ChordState) -> None:
        """Publish the callback of a complete chord, or fail it, and then record that."""
        outcome = "success" if state.clean else "failure"
        if state.complete and state.dispatched not in ("success", outcome):
            self.workers.checkpoint("publish")
            self.published.append(outcome)
            self.chord_states.mark_dispatched("c", "success" if state.clean else "failure")

    def publish(self, parts: list[tuple[Part, list[bool]]]) -> None:
        """Publish the parts as Celery does: set the size before the last part; workers start on each part at once."""
        self.chord_states.open("c", callback="{}")
        for number, (one, outcomes) in enumerate(parts):
            if number == len(parts) - 1:
                self.chord_states.resize("c", len(parts))
            for ok in outcomes:
                self.deliver(one, ok=ok)

    @property
    def dispatched(self) -> str | None:
        """Return the outcome that is recorded in the root."""
        dispatched: str | None = self.table.items["chord-join-c"].get("fired", {"S": None})["S"]
        return dispatched


#: For each part, whether each of its deliveries succeeds.
deliveries = st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(st.data(), deliveries, st.integers(1, 3), st.booleans(), st.integers(0, 3), st.booleans())
def test_any_history_dispatches_the_right_callback(
    data: st.DataObject, outcomes: list[list[bool]], shard: int, is_regular: bool, kills: int, redelivers: bool
) -> None:
    """The callback is dispatched once all parts have returned, as a success if each has succeeded once.

    Calls happen in any order, with duplicates and killed workers. If messages of killed workers are not redelivered, reading
    the shards repairs the chords that are complete.
    """
    size = len(outcomes)
    indexes = list(range(size)) if is_regular else [data.draw(st.integers(0, size - 1)) for _ in range(size)]
    remaining = count(kills, -1)
    history = History(
        shard=shard,
        choose=lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0,
        dies=lambda: kills > 0 and data.draw(st.integers(0, 9)) == 0 and next(remaining) > 0,
        redelivers=redelivers,
    )
    parts = [(part(index, number), one) for number, (index, one) in enumerate(zip(indexes, outcomes, strict=True))]
    history.workers.start(lambda: history.publish(parts), mortal=False)
    history.workers.run()

    clean = all(any(one) for one in outcomes)
    if redelivers or not history.kills:
        assert history.dispatched == ("success" if clean else "failure")
        assert history.published[-1] == history.dispatched or "success" in history.published
    if not history.kills and all(len(one) == 1 for one in outcomes):
        assert history.published == [history.dispatched]
    if not redelivers and history.kills:
        history.dispatch(history.chord_states.counted("c"))
        returned = history.chord_states.returned("c")
        if len(returned.parts) == size:
            assert history.dispatched == ("failure" if returned.failed else "success")
        else:
            assert history.dispatched is None


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_parts_that_share_an_index_complete_their_chord_in_any_order(order: tuple[int, ...]) -> None:
    """Three parts have index 0 and one has index 2, so one shard has too many parts and another one too few."""
    parts = [part(0, 0), part(0, 1), part(0, 2), part(2, 3)]
    chord_states = opened(ResultsTable(), 4, shard=2)
    done = [chord_states.record_part("c", parts[number], ok=True).complete for number in order]
    assert done == [False, False, False, True]


@pytest.mark.parametrize("steps", list(product((0, 1), repeat=7)), ids=str)
@pytest.mark.parametrize("is_sized", [True, False], ids=["sized", "not yet sized"])
def test_the_worker_that_finds_a_chord_irregular_misses_no_part(steps: tuple[int, ...], is_sized: bool) -> None:
    """Its first calls run in any order with those of the publisher and the last part; exactly one part completes the chord."""
    table = ResultsTable()
    chord_states = chord_states_over(table, shard=2)
    chord_states.open("c")
    if is_sized:
        chord_states.resize("c", 4)
    for one in (part(0, 0), part(1, 1)):
        chord_states.record_part("c", one, ok=True)
    choices = iter(steps)
    workers = Workers(lambda n: next(choices, 0) % n, lambda: False)
    table.before_call = workers.checkpoint
    done: list[bool] = []

    def last() -> None:
        if not is_sized:
            chord_states.resize("c", 4)
        done.append(chord_states.record_part("c", part(2, 3), ok=True).complete)

    workers.start(lambda: done.append(chord_states.record_part("c", part(0, 2), ok=True).complete))
    workers.start(last)
    workers.run()
    assert sum(done) == 1


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_a_chord_with_gaps_in_its_indexes_completes_once(
    data: st.DataObject, size: int, shard: int, gaps: int, kills: int
) -> None:
    """Celery leaves gaps where it drops empty canvases from a header. Calls happen in any order, and workers are killed."""
    remaining = count(kills, -1)
    indexes = data.draw(st.permutations(range(size + gaps)))[:size]
    history = History(
        shard=shard,
        choose=lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0,
        dies=lambda: kills > 0 and data.draw(st.integers(0, 9)) == 0 and next(remaining) > 0,
        redelivers=True,
    )
    history.workers.start(lambda: history.publish([(part(index), [True]) for index in indexes]), mortal=False)
    history.workers.run()
    assert history.dispatched == "success"
    if not history.kills:
        assert history.published == ["success"]


@pytest.mark.parametrize("at", range(1, 9))
def test_marking_a_chord_irregular_is_repeated_after_a_crash(at: int) -> None:
    """The first part's worker is killed before one of its calls; the second part still completes the chord."""
    table = ResultsTable()
    chord_states = opened(table, 2, shard=2)
    calls = count(1)

    def kill(_: str) -> None:
        if next(calls) == at:
            raise Killed

    table.before_call = kill
    with suppress(Killed):
        assert not chord_states.record_part("c", part(5), ok=True).complete
    assert not chord_states.record_part("c", part(5), ok=True).complete
    assert chord_states.record_part("c", part(0), ok=True).complete


@pytest.mark.parametrize("length", [150, 201, 250, 401])
def test_one_gap_in_the_indexes_of_a_long_header(length: int) -> None:
    """The last part completes the chord, whichever shard has the gap."""
    for gap in (0, 100, length - 2):
        chord_states = opened(ResultsTable(), length - 1)
        indexes = [index for index in range(length) if index != gap]
        done = [chord_states.record_part("c", part(index), ok=True).complete for index in indexes]
        assert done == [False] * (length - 2) + [True]


def test_a_complete_irregular_chord_is_checked_soon() -> None:
    """However old the chord is, its next check is near, because the worker of the claiming part may die before it publishes."""
    hours = 8 * 3_600
    chord_states = opened(table := ResultsTable(), 2)
    chord_states.record_part("c", part(0, 0), ok=True)
    assert chord_states.read("c", NOW + hours) is not None
    late = chord_states_over(table, clock=lambda: NOW + hours)
    assert late.record_part("c", part(0, 1), ok=True).complete
    assert late.record_part("c", part(0, 1), ok=True).complete
    assert not late.record_part("c", part(0, 0), ok=True).complete
    found = late.read("c", NOW + hours + 60)
    assert found is not None
    assert found.complete


def test_a_part_counts_once_however_often_it_is_recorded() -> None:
    """A part that is recorded several times, as failed and as succeeded, is one part, and has succeeded."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    for ok in (True, False, False, True, False):
        assert not chord_states.record_part("c", part(0), ok=ok).complete
    done = chord_states.record_part("c", part(1), ok=True)
    assert (done.complete, done.clean, done.dispatched, done.size) == (True, True, None, 2)
    assert chord_states.returned("c").succeeded == [part(0), part(1)]


def test_a_chord_is_unclean_until_its_failed_part_succeeds() -> None:
    """Recording the later success finds the chord complete again."""
    chord_states = opened(ResultsTable(), 3, shard=2)
    chord_states.record_part("c", part(0), ok=False)
    chord_states.record_part("c", part(2), ok=True)
    done = chord_states.record_part("c", part(1), ok=True)
    assert (done.complete, done.clean) == (True, False)
    assert chord_states.returned("c").failed == [part(0)]
    chord_states.mark_dispatched("c", "failure")
    succeeded = chord_states.record_part("c", part(0), ok=True)
    assert (succeeded.complete, succeeded.clean, succeeded.dispatched) == (True, True, "failure")


def test_a_dispatched_success_stays_and_the_chord_is_not_open() -> None:
    """A later failure does not overwrite it. The index of open chords lists a chord until it is dispatched."""
    table = ResultsTable()
    chord_states = opened(table, 1)
    assert list(chord_states.undispatched(NOW + 60)) == ["c"]
    assert list(chord_states.undispatched(NOW + 59)) == []
    chord_states.mark_dispatched("c", "success")
    chord_states.mark_dispatched("c", "failure")
    assert chord_states.record_part("c", part(0), ok=True).dispatched == "success"
    assert list(chord_states.undispatched(NOW + 60)) == []


def test_each_check_postpones_the_next_one() -> None:
    """The delay is a minute, or a quarter of the chord's age: an incomplete chord costs less and less, until it expires."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    checks = [
        second
        for second in range(600)
        if list(chord_states.undispatched(NOW + second)) and chord_states.read("c", NOW + second)
    ]
    assert checks == [60, 120, 180, 240, 300, 375, 468, 585]
    assert int(table.items["chord-join-c"]["ttl"]["N"]) == NOW + DAYS
    assert chord_states.read("unknown", NOW) is None


def test_a_chord_with_a_full_shard_is_checked_soon() -> None:
    """However old the chord is, its next check is near, because the last shard's worker may die before it publishes."""
    table = ResultsTable()
    hours = 8 * 3_600
    chord_states = opened(table, 1)
    assert chord_states.read("c", NOW + hours) is not None
    late = chord_states_over(table, clock=lambda: NOW + hours)
    late.record_part("c", part(0), ok=True)
    found = late.read("c", NOW + hours + 60)
    assert found is not None
    assert found.complete


def test_only_one_process_checks_a_chord() -> None:
    """If two processes find a chord due for a check at the same moment, one of them checks it."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    # The job that waited longest is resumed, so the jobs alternate call by call.
    workers = Workers(lambda _: 0, lambda: False)
    table.before_call = workers.checkpoint
    checked: list[bool] = []
    for _ in range(2):
        workers.start(lambda: checked.append(chord_states.read("c", NOW + 60) is not None))
    workers.run()
    assert sorted(checked) == [False, True]
    assert chord_states.read("c", NOW + 61) is None


def test_opening_a_chord_again_changes_nothing() -> None:
    """A chord in a chain is applied again, with the same ids, if the task before it is delivered again."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    chord_states.record_part("c", part(0), ok=True)
    chord_states.open("c", callback="another")
    chord_states.resize("c", 2)
    done = chord_states.record_part("c", part(1), ok=True)
    assert done.complete
    assert done.given == {"callback": "{}"}


def test_the_size_never_shrinks() -> None:
    """Celery 5.6 reports the size of an inner group as if it were the size of the outer chord."""
    chord_states = opened(ResultsTable(), 3)
    chord_states.resize("c", 2)
    assert [chord_states.record_part("c", part(index), ok=True).complete for index in range(3)] == [False, False, True]


def test_a_chord_whose_size_grows_waits_for_every_part() -> None:
    """A shard that was the last one under a smaller size does not complete the chord when it has that many parts."""
    chord_states = chord_states_over(ResultsTable(), shard=2)
    chord_states.open("c")
    for size in (1, 5):
        chord_states.resize("c", size)
    assert [chord_states.record_part("c", part(index), ok=True).complete for index in (0, 4, 2, 3, 1)] == [
        *[False] * 4,
        True,
    ]


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_parts_may_return_before_the_size_is_set(order: tuple[int, ...]) -> None:
    """The last shard may be full before that; the size is set before the last part is published."""
    chord_states = chord_states_over(ResultsTable(), shard=3)
    chord_states.open("c")
    *first, last = order
    done = [chord_states.record_part("c", part(number), ok=False).complete for number in first]
    chord_states.resize("c", 4)
    assert [*done, chord_states.record_part("c", part(last), ok=False).complete] == [False, False, False, True]


def test_a_chord_waits_for_an_added_part() -> None:
    """A part that is added twice counts once. It has the index of the part that added it, so its shard gets a surplus part."""
    chord_states = opened(ResultsTable(), 3, shard=2)
    added = part(0, 7)
    chord_states.extend("c", added.id)
    chord_states.extend("c", added.id)
    for index in range(3):
        assert not chord_states.record_part("c", part(index), ok=True).complete
    assert chord_states.record_part("c", added, ok=True).complete


def test_recording_a_part_of_an_expired_chord_raises_condition_failed() -> None:
    """The part is too late; the shards that are left expire by themselves."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    chord_states.record_part("c", part(0), ok=True)
    del table.items["chord-join-c"]
    with pytest.raises(ConditionFailed):
        chord_states.record_part("c", part(1), ok=True)
    chord_states.resize("c", 2)
    assert set(table.items) == {"chord-join-c#0"}


def test_every_item_expires_and_each_write_postpones_that() -> None:
    """A chord is kept as long as messages of its parts may arrive."""
    table = ResultsTable()
    chord_states = opened(table, 300)
    later = chord_states_over(table, clock=lambda: NOW + 5)
    chord_states.record_part("c", part(0), ok=True)
    later.record_part("c", part(250), ok=True)
    assert {key: int(item["ttl"]["N"]) - DAYS for key, item in table.items.items()} == {
        "chord-join-c": NOW + 5,
        "chord-join-c#0": NOW,
        "chord-join-c#1": NOW + 5,
    }


def test_the_cost_of_20_000_parts() -> None:
    """Each part costs one call, and each of 100 shards three more; no item reaches 6 KB."""
    table = ResultsTable()
    chord_states = opened(table, 20_000)
    table.calls.clear()
    done = [chord_states.record_part("c", part(index), ok=True).complete for index in range(20_000)]
    assert done.index(True) == 19_999
    assert table.calls == ["UpdateItem"] * (20_000 + 100 + 2 * 99 + 1)
    sizes = [sum(len(member) * 3 // 4 for member in item["ok"]["BS"]) for item in table.items.values() if "ok" in item]
    assert len(sizes) == 100
    assert max(sizes) < 6_000


def test_task_ids_need_not_be_uuids() -> None:
    """The ids are returned unchanged, in the order of their indexes."""
    chord_states = opened(ResultsTable(), 3)
    names = ["request/17", str(UUID(int=5)), str(UUID(int=6)).upper().replace("-", "")]
    for index, name in enumerate(names):
        chord_states.record_part("c", Part(index, name), ok=True)
    assert [one.id for one in chord_states.returned("c").parts] == names
