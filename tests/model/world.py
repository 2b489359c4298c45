"""Delivers messages through the store's real parts, following a schedule that decides what happens next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mdstore.errors import LaneUnfinished, Unavailable
from tests.model.deliveries import Call, CallResult, Clock, Delivery, Killed
from tests.model.environment import Environment, Parts
from tests.model.history import require
from tests.model.network import Recorder, actions_of, place_of
from tests.model.schedule import Act, Step, busy, must_repeat, no_answer
from tests.model.tasks import Kind, Message, Tasks

_AT_WORK = 4  # concurrent deliveries
_CALLS = 20_000  # a run with more acts does not terminate
#: Picks up to these choose a waiting message that is not under way, or any waiting one; higher picks any message ever sent.
_FRESH, _WAITING = 5, 8
_EXTRA_MESSAGES: dict[Act, Kind] = {Act.GIVE_UP: "give_up", Act.FINISH_EARLY: "finish_early"}
_LONG = 1_000.0  # seconds; longer than any budget


class World:
    """Delivers messages and answers calls; `happened` counts the acts."""

    def __init__(self, environment: Environment, recorder: Recorder, tasks: Tasks) -> None:
        self._environment = environment
        self._recorder = recorder
        self._tasks = tasks
        self._running: list[tuple[Message, Delivery]] = []
        self._late: list[Call] = []
        self._unanswered: dict[tuple[Delivery, tuple[str, str]], bytes] = {}
        self._clock = 1_700_000_000.0
        self.happened: Counter[Act] = Counter()

    def run(self, steps: Sequence[Step]) -> None:
        """Follow a schedule, then continue without faults until every message is acknowledged."""
        try:
            for step in steps:
                self._act(step)
            while self._running or self._tasks.waiting:
                self._act(Step(Act.GO))
                require(self.happened.total() < _CALLS, "the run does not terminate")
        finally:
            for _, delivery in self._running:
                delivery.kill()

    def end(self) -> None:
        """Let all late calls take effect."""
        while self._late:
            self._answer(self._late.pop())

    def _act(self, step: Step) -> None:
        act, pick = step.act, step.pick
        room = len(self._running) < _AT_WORK
        lanes = [message for message in self._tasks.seen if message.kind == "apply_lane"]
        if act is Act.FORGET:
            self._environment.service.forget()
        elif act is Act.LATE_EFFECT and self._late:
            self._answer(self._late.pop(pick % len(self._late)))
        elif act in _EXTRA_MESSAGES and room and lanes:
            lane = lanes[pick % len(lanes)]
            self._deliver(Message(_EXTRA_MESSAGES[act], lane.request_id, lane.lane))
        elif not self._running or (act is Act.START and room):
            act = Act.START
            self._deliver(self._chosen(pick))
        else:
            act = Act.GO if act in (Act.LATE_EFFECT, Act.START, *_EXTRA_MESSAGES) else act
            calls = [(*pair, call) for pair in self._running for call in pair[1].calls]
            self._happen(act, pick, *calls[pick % len(calls)])
        self.happened[act] += 1

    def _chosen(self, pick: int) -> Message:
        waiting = self._tasks.waiting
        under_way = {message for message, _ in self._running}
        fresh = [message for message in waiting if message not in under_way]
        choice = (fresh if pick <= _FRESH else waiting if pick <= _WAITING else []) or self._tasks.seen
        return choice[pick % len(choice)]

    def _happen(self, act: Act, pick: int, message: Message, delivery: Delivery, call: Call) -> None:
        """Apply `act` to a call and its delivery."""
        if call.operation == "TransactWriteItems":
            previous = self._unanswered.pop((delivery, _receipt(call)), call.body)
            require(previous == call.body, "an unanswered transaction was sent again with another body")
        answer = self._answer(call) if act in (Act.GO, Act.LOST, Act.DIE_AFTER) else None
        if act in (Act.LATE, Act.DIE_CALLING):
            self._late += [call] if act is Act.LATE else delivery.calls
        if act is Act.TIME_OUT:
            delivery.clock.now += _LONG
        if act in (Act.DIE, Act.DIE_AFTER, Act.DIE_CALLING):
            delivery.kill()
        elif act is Act.BUSY:
            self._finish_call(delivery, call, busy(call, pick))
        else:
            self._finish_call(delivery, call, answer if act is Act.GO and answer else no_answer())
        if delivery.over:
            self._running.remove((message, delivery))
            self._ended(message, delivery)

    def _answer(self, call: Call) -> CallResult:
        return self._recorder.answer(call.operation, call.body)

    def _finish_call(self, delivery: Delivery, call: Call, result: CallResult) -> None:
        if call.operation == "TransactWriteItems" and must_repeat(result):
            self._unanswered[delivery, _receipt(call)] = call.body
        delivery.finish_call(call, result)

    def _deliver(self, message: Message) -> None:
        self._clock += 1
        work = self._tasks.work(message)
        delivery = Delivery(Clock(self._clock), lambda http, clock: work(Parts(self._environment, http, clock)))
        if delivery.over:
            self._ended(message, delivery)
        else:
            self._running.append((message, delivery))

    def _ended(self, message: Message, delivery: Delivery) -> None:
        if delivery.error is None:
            self._tasks.done(message, delivery.result)
        elif isinstance(delivery.error, LaneUnfinished):
            self._tasks.send_again(message)
        elif not isinstance(delivery.error, Killed | Unavailable):  # after these the message is delivered again
            raise delivery.error


def _receipt(call: Call) -> tuple[str, str]:
    return place_of(actions_of(call.body)[-1])
