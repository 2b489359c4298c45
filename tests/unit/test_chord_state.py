"""The join, over a table in memory: deliveries in any order, several times, side by side, and killed between two calls."""

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


def joins_over(table: ResultsTable, *, shard: int = 200, clock: Callable[[], float] = lambda: NOW) -> ChordStates:
    """Joins with shards small enough to have several."""
    return ChordStates(dynamo=table, table="results", retention=DAYS, clock=clock, shard=shard)


def part(index: int, number: int | None = None) -> Part:
    """A part of an index; the number tells those of one index apart."""
    return Part(index, str(UUID(int=index if number is None else 1_000 + number)))


def opened(table: ResultsTable, size: int, *, shard: int = 200) -> ChordStates:
    """A join "j" whose parts are all published."""
    chord_states = joins_over(table, shard=shard)
    chord_states.open("j", callback="{}")
    chord_states.resize("j", size)
    return chord_states


class History:
    """One join, its deliveries, and what was published; each delivery does what the backend does."""

    def __init__(self, *, shard: int, choose: Callable[[int], int], dies: Callable[[], bool], redelivers: bool) -> None:
        self.table = ResultsTable()
        self.chord_states = joins_over(self.table, shard=shard)
        self.workers = Workers(choose, dies)
        self.table.turn = self.workers.turn
        self.published: list[str] = []
        self.kills = 0
        self._redelivers = redelivers

    def deliver(self, one: Part, *, ok: bool) -> None:
        """Put a message into the queue; it comes again when its worker is killed."""

        def done(killed: bool) -> None:
            self.kills += killed
            if killed and self._redelivers:
                self.deliver(one, ok=ok)

        self.workers.start(lambda: self.settle(self.chord_states.record_part("j", one, ok=ok)), done=done)

    def settle(self, join: ChordState) -> None:
        """Publish, then note it."""
        outcome = "success" if join.clean else "failure"
        if join.complete and join.dispatched not in ("success", outcome):
            self.workers.turn("publish")
            self.published.append(outcome)
            self.chord_states.mark_dispatched("j", "success" if join.clean else "failure")

    def publish(self, parts: list[tuple[Part, list[bool]]]) -> None:
        """A publisher, as Celery is one: the size comes before the last part, whose workers begin at once."""
        self.chord_states.open("j", callback="{}")
        for number, (one, outcomes) in enumerate(parts):
            if number == len(parts) - 1:
                self.chord_states.resize("j", len(parts))
            for ok in outcomes:
                self.deliver(one, ok=ok)

    @property
    def dispatched(self) -> str | None:
        """What is noted in the root."""
        dispatched: str | None = self.table.items["chord-join-j"].get("fired", {"S": None})["S"]
        return dispatched


#: Outcomes of each delivery of each part.
deliveries = st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(st.data(), deliveries, st.integers(1, 3), st.booleans(), st.integers(0, 3), st.booleans())
def test_any_history_ends_with_the_right_callback(
    data: st.DataObject, outcomes: list[list[bool]], shard: int, even: bool, kills: int, redelivers: bool
) -> None:
    """In any order of calls, with duplicates and deaths: fired once every part returned, a success when each succeeded once.

    Where messages of killed workers do not come again, reading the shards repairs what is complete.
    """
    size = len(outcomes)
    indexes = list(range(size)) if even else [data.draw(st.integers(0, size - 1)) for _ in range(size)]
    left = count(kills, -1)
    history = History(
        shard=shard,
        choose=lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0,
        dies=lambda: kills > 0 and data.draw(st.integers(0, 9)) == 0 and next(left) > 0,
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
        history.settle(history.chord_states.counted("j"))
        returned = history.chord_states.returned("j")
        if len(returned.parts) == size:
            assert history.dispatched == ("failure" if returned.failed else "success")
        else:
            assert history.dispatched is None


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_parts_of_the_same_index_complete_their_join_in_any_order(order: tuple[int, ...]) -> None:
    """With three parts of index 0 and one of index 2, shards are neither as full as they should be nor all there."""
    parts = [part(0, 0), part(0, 1), part(0, 2), part(2, 3)]
    chord_states = opened(ResultsTable(), 4, shard=2)
    done = [chord_states.record_part("j", parts[number], ok=True).complete for number in order]
    assert done == [False, False, False, True]


@pytest.mark.parametrize("steps", list(product((0, 1), repeat=7)), ids=str)
@pytest.mark.parametrize("is_sized", [True, False], ids=["sized", "not yet sized"])
def test_who_finds_a_join_uneven_misses_no_part(steps: tuple[int, ...], is_sized: bool) -> None:
    """In each order of its first calls and those of the publisher and the last part, exactly one of both completes the join."""
    table = ResultsTable()
    chord_states = joins_over(table, shard=2)
    chord_states.open("j")
    if is_sized:
        chord_states.resize("j", 4)
    for one in (part(0, 0), part(1, 1)):
        chord_states.record_part("j", one, ok=True)
    choices = iter(steps)
    workers = Workers(lambda n: next(choices, 0) % n, lambda: False)
    table.turn = workers.turn
    done: list[bool] = []

    def last() -> None:
        if not is_sized:
            chord_states.resize("j", 4)
        done.append(chord_states.record_part("j", part(2, 3), ok=True).complete)

    workers.start(lambda: done.append(chord_states.record_part("j", part(0, 2), ok=True).complete))
    workers.start(last)
    workers.run()
    assert sum(done) == 1


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_indexes_with_gaps_complete_their_join_once(
    data: st.DataObject, size: int, shard: int, gaps: int, kills: int
) -> None:
    """As where Celery drops empty canvases from a header and goes on counting: in any order of all calls, with deaths."""
    left = count(kills, -1)
    indexes = data.draw(st.permutations(range(size + gaps)))[:size]
    history = History(
        shard=shard,
        choose=lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0,
        dies=lambda: kills > 0 and data.draw(st.integers(0, 9)) == 0 and next(left) > 0,
        redelivers=True,
    )
    history.workers.start(lambda: history.publish([(part(index), [True]) for index in indexes]), mortal=False)
    history.workers.run()
    assert history.dispatched == "success"
    if not history.kills:
        assert history.published == ["success"]


@pytest.mark.parametrize("at", range(1, 9))
def test_who_dies_while_marking_marks_again(at: int) -> None:
    """Of two parts with a gap between them the second one tells, whichever of its calls it dies before."""
    table = ResultsTable()
    chord_states = opened(table, 2, shard=2)
    calls = count(1)

    def turn(_: str) -> None:
        if next(calls) == at:
            raise Killed

    table.turn = turn
    with suppress(Killed):
        assert not chord_states.record_part("j", part(5), ok=True).complete
    assert not chord_states.record_part("j", part(5), ok=True).complete
    assert chord_states.record_part("j", part(0), ok=True).complete


@pytest.mark.parametrize("length", [150, 201, 250, 401])
def test_one_empty_canvas_in_a_header_of_any_length(length: int) -> None:
    """The last part completes the join, whichever shard the gap is in."""
    for gap in (0, 100, length - 2):
        chord_states = opened(ResultsTable(), length - 1)
        indexes = [index for index in range(length) if index != gap]
        done = [chord_states.record_part("j", part(index), ok=True).complete for index in indexes]
        assert done == [False] * (length - 2) + [True]


def test_a_complete_uneven_join_is_looked_at_soon() -> None:
    """However old it is: the part that took it may die before the callback is published."""
    hours = 8 * 3_600
    chord_states = opened(table := ResultsTable(), 2)
    chord_states.record_part("j", part(0, 0), ok=True)
    assert chord_states.read("j", NOW + hours) is not None
    late = joins_over(table, clock=lambda: NOW + hours)
    assert late.record_part("j", part(0, 1), ok=True).complete
    assert late.record_part("j", part(0, 1), ok=True).complete
    assert not late.record_part("j", part(0, 0), ok=True).complete
    found = late.read("j", NOW + hours + 60)
    assert found is not None
    assert found.complete


def test_a_part_in_any_state_counts_once() -> None:
    """Noted ten times, failed and succeeded, a part is one part, and it succeeded."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    for ok in (True, False, False, True, False):
        assert not chord_states.record_part("j", part(0), ok=ok).complete
    done = chord_states.record_part("j", part(1), ok=True)
    assert (done.complete, done.clean, done.dispatched, done.size) == (True, True, None, 2)
    assert chord_states.returned("j").succeeded == [part(0), part(1)]


def test_a_failed_part_makes_a_join_unclean_until_it_succeeds() -> None:
    """The note that tells of it later is a complete join again."""
    chord_states = opened(ResultsTable(), 3, shard=2)
    chord_states.record_part("j", part(0), ok=False)
    chord_states.record_part("j", part(2), ok=True)
    done = chord_states.record_part("j", part(1), ok=True)
    assert (done.complete, done.clean) == (True, False)
    assert chord_states.returned("j").failed == [part(0)]
    chord_states.mark_dispatched("j", "failure")
    mended = chord_states.record_part("j", part(0), ok=True)
    assert (mended.complete, mended.clean, mended.dispatched) == (True, True, "failure")


def test_a_success_stays_and_a_fired_join_is_not_open() -> None:
    """Whatever is noted after it; the index of open joins has those of before, until they are fired."""
    table = ResultsTable()
    chord_states = opened(table, 1)
    assert list(chord_states.undispatched(NOW + 60)) == ["j"]
    assert list(chord_states.undispatched(NOW + 59)) == []
    chord_states.mark_dispatched("j", "success")
    chord_states.mark_dispatched("j", "failure")
    assert chord_states.record_part("j", part(0), ok=True).dispatched == "success"
    assert list(chord_states.undispatched(NOW + 60)) == []


def test_a_look_puts_off_the_next_one() -> None:
    """By a minute, or by a quarter of the join's age: what never completes costs less and less, and ends."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    looks = [
        second
        for second in range(600)
        if list(chord_states.undispatched(NOW + second)) and chord_states.read("j", NOW + second)
    ]
    assert looks == [60, 120, 180, 240, 300, 375, 468, 585]
    assert int(table.items["chord-join-j"]["ttl"]["N"]) == NOW + DAYS
    assert chord_states.read("nobody", NOW) is None


def test_a_full_shard_is_looked_at_soon() -> None:
    """However old the join is: the last shard's noter may die before the callback is published."""
    table = ResultsTable()
    hours = 8 * 3_600
    chord_states = opened(table, 1)
    assert chord_states.read("j", NOW + hours) is not None
    late = joins_over(table, clock=lambda: NOW + hours)
    late.record_part("j", part(0), ok=True)
    found = late.read("j", NOW + hours + 60)
    assert found is not None
    assert found.complete


def test_one_process_looks_at_a_join() -> None:
    """Of two that found it at the same moment."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    workers = Workers(lambda _: 0, lambda: False)  # the one that waited longest: call by call
    table.turn = workers.turn
    looked: list[bool] = []
    for _ in range(2):
        workers.start(lambda: looked.append(chord_states.read("j", NOW + 60) is not None))
    workers.run()
    assert sorted(looked) == [False, True]
    assert chord_states.read("j", NOW + 61) is None


def test_a_join_that_is_opened_again_goes_on() -> None:
    """The chord in a chain is applied again when the task before it is delivered again; its ids are the same."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    chord_states.record_part("j", part(0), ok=True)
    chord_states.open("j", callback="another")
    chord_states.resize("j", 2)
    done = chord_states.record_part("j", part(1), ok=True)
    assert done.complete
    assert done.given == {"callback": "{}"}


def test_the_size_never_shrinks() -> None:
    """Celery 5.6 says the size of an inner group as if it were that of the chord around it."""
    chord_states = opened(ResultsTable(), 3)
    chord_states.resize("j", 2)
    assert [chord_states.record_part("j", part(index), ok=True).complete for index in range(3)] == [False, False, True]


def test_a_size_that_grows_waits_for_every_part() -> None:
    """Shards that were the last by the size before are not done when that many of their parts returned."""
    chord_states = joins_over(ResultsTable(), shard=2)
    chord_states.open("j")
    for size in (1, 5):
        chord_states.resize("j", size)
    assert [chord_states.record_part("j", part(index), ok=True).complete for index in (0, 4, 2, 3, 1)] == [
        *[False] * 4,
        True,
    ]


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_parts_are_published_in_any_order(order: tuple[int, ...]) -> None:
    """The last shard may be full before the size is said, which is before the last part is published."""
    chord_states = joins_over(ResultsTable(), shard=3)
    chord_states.open("j")
    *first, last = order
    done = [chord_states.record_part("j", part(number), ok=False).complete for number in first]
    chord_states.resize("j", 4)
    assert [*done, chord_states.record_part("j", part(last), ok=False).complete] == [False, False, False, True]


def test_an_added_part_is_waited_for() -> None:
    """Added twice it is one; it has its adder's index, whose shard is fuller than it should be."""
    chord_states = opened(ResultsTable(), 3, shard=2)
    added = part(0, 7)
    chord_states.extend("j", added.id)
    chord_states.extend("j", added.id)
    for index in range(3):
        assert not chord_states.record_part("j", part(index), ok=True).complete
    assert chord_states.record_part("j", added, ok=True).complete


def test_a_join_that_is_gone_says_so() -> None:
    """Its parts come too late; what they left ends by itself."""
    table = ResultsTable()
    chord_states = opened(table, 2)
    chord_states.record_part("j", part(0), ok=True)
    del table.items["chord-join-j"]
    with pytest.raises(ConditionFailed):
        chord_states.record_part("j", part(1), ok=True)
    chord_states.resize("j", 2)
    assert set(table.items) == {"chord-join-j#0"}


def test_every_item_ends_and_each_write_puts_that_off() -> None:
    """A join is kept as long as messages of its parts may come."""
    table = ResultsTable()
    chord_states = opened(table, 300)
    later = joins_over(table, clock=lambda: NOW + 5)
    chord_states.record_part("j", part(0), ok=True)
    later.record_part("j", part(250), ok=True)
    assert {key: int(item["ttl"]["N"]) - DAYS for key, item in table.items.items()} == {
        "chord-join-j": NOW + 5,
        "chord-join-j#0": NOW,
        "chord-join-j#1": NOW + 5,
    }


def test_20_000_parts() -> None:
    """A call each, and three more for each of 100 shards; no item reaches 6 KB."""
    table = ResultsTable()
    chord_states = opened(table, 20_000)
    table.calls.clear()
    done = [chord_states.record_part("j", part(index), ok=True).complete for index in range(20_000)]
    assert done.index(True) == 19_999
    assert table.calls == ["UpdateItem"] * (20_000 + 100 + 2 * 99 + 1)
    sizes = [sum(len(member) * 3 // 4 for member in item["ok"]["BS"]) for item in table.items.values() if "ok" in item]
    assert len(sizes) == 100
    assert max(sizes) < 6_000


def test_ids_need_not_be_uuids() -> None:
    """They come back as they were, in the order of their indexes."""
    chord_states = opened(ResultsTable(), 3)
    names = ["request/17", str(UUID(int=5)), str(UUID(int=6)).upper().replace("-", "")]
    for index, name in enumerate(names):
        chord_states.record_part("j", Part(index, name), ok=True)
    assert [one.id for one in chord_states.returned("j").parts] == names
