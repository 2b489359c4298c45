"""The courier and its keeper, with an SQS in memory and threads of their own."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mdstore.aws.sqs import Failed, Message
from mdstore.errors import Unavailable
from mdstore.queue.broker.poller import Held, Pace, Poller
from tests.unit.fake_sqs import FakeSqs
from tests.waiting import until

QUEUE = "work"
SHORT = 1  # second of visibility: extended three times in it


@pytest.fixture
def sqs() -> FakeSqs:
    return FakeSqs()


@contextmanager
def poller(sqs: FakeSqs, *, room: int = 0, ahead: int = 1, visibility: int = 60, **options: Any) -> Iterator[Poller]:
    options.setdefault("open_message", lambda _, message: message.body)
    made = Poller(
        sqs=sqs, wait_time=1, visibility=visibility, ahead=ahead, room=lambda: room, wake=lambda: None, **options
    )
    made.consume(QUEUE, QUEUE, needs_room=True)
    try:
        yield made
    finally:
        made.close(5.0)


def take(made: Poller) -> Held:
    held = made.take(timeout=5.0)
    assert held is not None
    return held


def test_what_is_done_is_deleted_ten_a_call(sqs: FakeSqs) -> None:
    for number in range(30):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs) as made:
        for held in [take(made) for _ in range(30)]:
            made.delete(held)
        until(lambda: len(sqs.all_deleted) == 30)
    assert len(sqs.deleted) <= 4
    assert sorted(sqs.all_deleted) == sorted(f"handle of m{number}" for number in range(30))
    assert sqs.shown == []


def test_one_delete_is_not_kept_waiting_for_others(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        made.delete(take(made))
        until(lambda: sqs.deleted, within=1.0)


def test_what_is_held_is_extended_until_it_is_done(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT) as made:
        held = take(made)
        until(lambda: len(sqs.shown) >= 3)
        assert set(sqs.shown) == {("handle of m", SHORT)}
        made.delete(held)
        until(lambda: sqs.deleted)
        count = len(sqs.shown)
        time.sleep(SHORT)
        assert len(sqs.shown) == count


def test_what_waits_is_extended_too(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT):
        until(lambda: len(sqs.shown) >= 2)


def test_a_loop_that_hangs_is_not_extended_for(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT, is_alive=lambda: False) as made:
        take(made)
        time.sleep(1.5 * SHORT)
        assert sqs.shown == []


def test_work_that_is_lost_is_given_back_and_makes_room(sqs: FakeSqs) -> None:
    class Work:
        """Something that may go away."""

    sqs.arrive(QUEUE, "m")
    lost: list[Held] = []
    with poller(sqs, room=1, lost=lost.append) as made:
        work = Work()
        held = take(made)
        found = weakref.ref(work)
        held.is_lost = lambda: found() is None
        time.sleep(1)
        assert (lost, sqs.shown) == ([], [])
        del work
        gc.collect()
        until(lambda: lost == [held])
        until(lambda: sqs.shown == [("handle of m", 0)])
        assert made.count() == 0
        sqs.arrive(QUEUE, "next")
        assert take(made).payload == "next"


def test_a_message_that_is_delivered_again_while_it_is_held_is_handed_out_once(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs, room=2) as made:
        held = take(made)
        sqs.arrive(QUEUE, "m", handle="new")
        sqs.arrive(QUEUE, "other")
        assert take(made).payload == "other"
        made.delete(held)
        until(lambda: sqs.all_deleted == ["new"])  # only the newest handle deletes it


def test_a_message_that_is_delivered_again_after_it_was_done_is_deleted_again(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs) as made:
        made.delete(take(made))
        sqs.arrive(QUEUE, "m", handle="new")
        until(lambda: sqs.all_deleted == ["old", "new"])
        assert made.take() is None


def test_a_cancelled_queue_gives_back_what_waits_and_keeps_what_is_at_work(sqs: FakeSqs) -> None:
    for name in "abc":
        sqs.arrive(QUEUE, name)
    with poller(sqs) as made:
        held = take(made)
        until(lambda: made.count() == 3)
        made.cancel(QUEUE)
        until(lambda: sorted(sqs.shown) == [("handle of b", 0), ("handle of c", 0)])
        made.delete(held)
        until(lambda: sqs.all_deleted == ["handle of a"])


def test_what_a_poll_brings_after_the_end_is_given_back(sqs: FakeSqs) -> None:
    with poller(sqs) as made:
        until(lambda: sqs.asked)
        made.cancel(QUEUE)
        sqs.arrive(QUEUE, "late")
        until(lambda: sqs.shown == [("handle of late", 0)])
        assert made.take() is None


def test_closing_gives_back_what_is_at_work(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        take(made)
    assert sqs.shown == [("handle of m", 0)]


def test_closing_sends_the_deletes(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        made.delete(take(made))
    assert sqs.all_deleted == ["handle of m"]


def test_no_more_is_asked_for_than_there_is_room(sqs: FakeSqs) -> None:
    for number in range(8):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, room=3) as made:
        taken = [take(made) for _ in range(3)]
        time.sleep(0.1)
        assert made.count() == 3
        assert made.take() is None
        made.delete(taken[0])
        assert take(made).payload == "m3"
    assert max(sqs.asked) == 3


def test_a_worker_that_is_fast_holds_more_than_it_works_on(sqs: FakeSqs) -> None:
    for number in range(100):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, room=2, ahead=10) as made:
        taken = take(made)
        until(lambda: made.count() == 2)
        for _ in range(60):
            made.delete(taken)
            taken = take(made)
        until(lambda: made.count() == 20)
    assert max(sqs.asked) == 10


def test_an_urgent_queue_needs_no_room(sqs: FakeSqs) -> None:
    sqs.arrive(QUEUE, "task")
    with poller(sqs, room=1) as made:
        take(made)
        sqs.arrive("control", "order")
        made.consume("control", "control", needs_room=False)
        held = made.take(timeout=5.0, only_urgent=True)
        assert held is not None
        assert held.payload == "order"
        until(lambda: sqs.all_deleted == ["handle of order"])
        made.cancel("control")


def test_a_receive_that_fails_is_tried_again(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdstore.queue.broker.poller._RECEIVE_AGAIN", 0.05)
    sqs.broken = True
    with poller(sqs) as made:
        until(lambda: len(sqs.asked) >= 3)
        assert made.liveness()["receive"] < 1.0
        sqs.broken = False
        sqs.arrive(QUEUE, "m")
        assert take(made).payload == "m"


def test_liveness_shows_that_no_receive_returns(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(sqs, "receive", lambda *_, **__: [] * over.wait(5.0))
    with poller(sqs) as made:
        until(lambda: made.liveness()["receive"] > 0.2)
        over.set()


@pytest.mark.parametrize(
    ("problem", "deleted", "shown"),
    [
        (None, ["handle of m"], []),
        (Unavailable("S3", code="Down"), [], [("handle of m", 300)]),
        (KeyError("x"), [], []),
    ],
    ids=["dealt with", "not now", "broken"],
)
def test_a_message_that_cannot_be_read_takes_nothing_with_it(
    sqs: FakeSqs, problem: Exception | None, deleted: list[str], shown: list[tuple[str, int]]
) -> None:
    def open_message(_: str, message: Message) -> str | None:
        if message.body != "m":
            return message.body
        if problem is not None:
            raise problem
        return None

    sqs.arrive(QUEUE, "m")
    sqs.arrive(QUEUE, "good")
    with poller(sqs, open_message=open_message, room=2) as made:
        good = take(made)
        assert good.payload == "good"
        until(lambda: made.count() == 1)
        until(lambda: (sqs.all_deleted, sqs.shown) == (deleted, shown))
        made.delete(good)


def test_what_a_receive_has_brought_is_held_at_once(sqs: FakeSqs) -> None:
    """Reading the first may take long; the others are extended meanwhile, and given back where the queue is cancelled."""
    over = threading.Event()

    def open_message(_: str, message: Message) -> str:
        over.wait(5.0)
        return message.body

    for number in range(3):
        sqs.arrive(QUEUE, f"m{number}")
    with poller(sqs, open_message=open_message, visibility=SHORT) as made:
        until(lambda: made.count() == 3)
        until(lambda: {handle for handle, _ in sqs.shown} == {f"handle of m{number}" for number in range(3)})
        assert made.liveness()["answer"] < 1.0
        made.cancel(QUEUE)
        over.set()
        until(lambda: made.count() == 0)
        until(lambda: {(f"handle of m{number}", 0) for number in range(3)} <= set(sqs.shown))
    assert sqs.deleted == []


def test_who_listens_slowly_leaves_the_rest_to_sqs(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that need no room do not pile up without bound."""
    monkeypatch.setattr("mdstore.queue.broker.poller._URGENT", 20)
    for number in range(100):
        sqs.arrive("events", f"e{number}")
    with poller(sqs) as made:
        made.consume("events", "events", needs_room=False)
        until(lambda: len(sqs.all_deleted) == 20)
        time.sleep(0.3)
        assert len(sqs.all_deleted) == 20
        for number in range(100):
            assert take(made).payload == f"e{number}"


def test_a_delete_that_fails_for_now_is_tried_again(sqs: FakeSqs) -> None:
    sqs.refuse["handle of m"] = Failed(code="InternalError")
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        made.delete(take(made))
        until(lambda: len(sqs.deleted) == 3)
        time.sleep(0.3)
        assert len(sqs.deleted) == 3


def test_a_message_that_cannot_be_extended_is_left_alone(sqs: FakeSqs) -> None:
    sqs.refuse["old"] = Failed(id="0", code="ReceiptHandleIsInvalid", sender_fault=True)
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs, visibility=SHORT, room=2) as made:
        held = take(made)
        until(lambda: sqs.shown == [("old", SHORT)])
        time.sleep(SHORT)
        assert len(sqs.shown) == 1
        assert made.count() == 1  # it is at work, and its room is taken
        sqs.arrive(QUEUE, "m", handle="new")
        until(lambda: ("new", SHORT) in sqs.shown)
        made.delete(held)
        until(lambda: sqs.all_deleted == ["new"])


def test_a_message_that_is_lost_while_it_waits_is_handed_out_once(sqs: FakeSqs) -> None:
    sqs.refuse["old"] = Failed(id="0", code="ReceiptHandleIsInvalid", sender_fault=True)
    sqs.arrive(QUEUE, "m", handle="old")
    with poller(sqs, visibility=SHORT) as made:
        until(lambda: sqs.shown and made.count() == 0)
        sqs.arrive(QUEUE, "m", handle="new")
        assert take(made).message.receipt_handle == "new"
        assert made.take(timeout=0.3) is None


def test_a_call_that_is_refused_is_no_message_s_fault(sqs: FakeSqs) -> None:
    """A token that has just expired: what is held is extended the next time, and deletes are tried again."""
    sqs.refuse["handle of m"] = Failed(code="ExpiredToken", sender_fault=True)
    sqs.arrive(QUEUE, "m")
    with poller(sqs, visibility=SHORT) as made:
        held = take(made)
        until(lambda: len(sqs.shown) >= 2)
        made.delete(held)
        until(lambda: len(sqs.deleted) == 3)


def test_whatever_a_receive_raises_the_queue_is_asked_again(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdstore.queue.broker.poller._RECEIVE_AGAIN", 0.05)
    receive, errors = sqs.receive, [KeyError("x"), OSError("y")]

    def broken(*args: Any, **kwargs: Any) -> list[Message]:
        if errors:
            raise errors.pop()
        return receive(*args, **kwargs)

    monkeypatch.setattr(sqs, "receive", broken)
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        assert take(made).payload == "m"


def test_whatever_a_delete_raises_it_is_tried_again(sqs: FakeSqs, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, errors = sqs.delete, [KeyError("x")]

    def broken(*args: Any, **kwargs: Any) -> list[Failed | None]:
        if errors:
            raise errors.pop()
        return delete(*args, **kwargs)

    monkeypatch.setattr(sqs, "delete", broken)
    sqs.arrive(QUEUE, "m")
    with poller(sqs) as made:
        made.delete(take(made))
        until(lambda: sqs.all_deleted == ["handle of m"])


def test_closing_waits_for_the_poll_of_a_queue_that_was_cancelled(sqs: FakeSqs) -> None:
    with poller(sqs) as made:
        until(lambda: sqs.asked)
        made.cancel(QUEUE)
        sqs.arrive(QUEUE, "late")
    assert sqs.shown == [("handle of late", 0)]


def test_the_pace_is_of_the_last_second() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for _ in range(1_000):
        now[0] += 0.01
        pace.count()
    assert 90 < pace.rate() < 110
    now[0] += 5.0
    assert pace.rate() < 1


def test_receivers_that_compete_for_the_last_room_all_go_on(sqs: FakeSqs) -> None:
    """Bursts and pauses, as fast as it goes: no receiver ends because another took the room that it waited for."""
    with poller(sqs, room=2, ahead=10) as made:
        for burst in range(60):
            for number in range(40):
                sqs.arrive(QUEUE, f"m{burst}-{number}")
            for _ in range(40):
                made.delete(take(made))
            made._pace._at -= 60  # a minute without work
