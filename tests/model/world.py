"""Messages on their way through the store's real parts, by a schedule that decides what happens next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mdstore.errors import Unavailable
from tests.model.deliveries import Call, Clock, Delivery, Killed, Landing
from tests.model.environment import Environment, Parts
from tests.model.history import require
from tests.model.network import Recorder, actions_of, place_of
from tests.model.schedule import Act, Step, busy, is_unknown, no_answer
from tests.model.tasks import Kind, Message, Tasks

_AT_WORK = 4  # deliveries at the same time
_CALLS = 20_000  # more of them, and something goes round in circles
_FRESH, _WAITING = 5, 8  # picks up to these are messages not under way, or waiting; above, any there ever were
_UNASKED: dict[Act, Kind] = {Act.GIVE_UP: "give_up", Act.HASTE: "finish_early"}
_LONG = 1_000.0  # seconds; more than any budget


class World:
    """Delivers messages and answers calls; `happened` counts what did."""

    def __init__(self, environment: Environment, recorder: Recorder, tasks: Tasks) -> None:
        self._site = environment
        self._recorder = recorder
        self._tasks = tasks
        self._live: list[tuple[Message, Delivery]] = []
        self._strays: list[Call] = []
        self._again: dict[tuple[Delivery, tuple[str, str]], bytes] = {}
        self._clock = 1_700_000_000.0
        self.happened: Counter[Act] = Counter()

    def run(self, steps: Sequence[Step]) -> None:
        """Follow a schedule; after its end go on without faults until every message is done with."""
        try:
            for step in steps:
                self._act(step)
            while self._live or self._tasks.waiting:
                self._act(Step(Act.GO))
                require(self.happened.total() < _CALLS, "it does not come to an end")
        finally:
            for _, delivery in self._live:
                delivery.kill()

    def end(self) -> None:
        """Let the calls take effect that are still under way though nobody waits for them."""
        while self._strays:
            self._answer(self._strays.pop())

    def _act(self, step: Step) -> None:
        act, pick = step.act, step.pick
        room = len(self._live) < _AT_WORK
        lanes = [message for message in self._tasks.seen if message.kind == "apply_lane"]
        if act is Act.FORGET:
            self._site.service.forget()
        elif act is Act.STRAY and self._strays:
            self._answer(self._strays.pop(pick % len(self._strays)))
        elif act in _UNASKED and room and lanes:
            lane = lanes[pick % len(lanes)]
            self._deliver(Message(_UNASKED[act], lane.request_id, lane.lane))
        elif not self._live or (act is Act.START and room):
            act = Act.START
            self._deliver(self._chosen(pick))
        else:
            act = Act.GO if act in (Act.STRAY, Act.START, *_UNASKED) else act
            flying = [(*pair, call) for pair in self._live for call in pair[1].calls]
            self._happen(act, pick, *flying[pick % len(flying)])
        self.happened[act] += 1

    def _chosen(self, pick: int) -> Message:
        waiting = self._tasks.waiting
        under_way = {message for message, _ in self._live}
        fresh = [message for message in waiting if message not in under_way]
        choice = (fresh if pick <= _FRESH else waiting if pick <= _WAITING else []) or self._tasks.seen
        return choice[pick % len(choice)]

    def _happen(self, act: Act, pick: int, message: Message, delivery: Delivery, call: Call) -> None:
        """Let `act` befall a call and its delivery."""
        if call.operation == "TransactWriteItems":
            former = self._again.pop((delivery, _receipt(call)), call.body)
            require(former == call.body, "what was not answered was not sent again as it was")
        landing = self._answer(call) if act in (Act.GO, Act.LOST, Act.DIE_AFTER) else None
        if act in (Act.LATE, Act.DIE_FLYING):
            self._strays += [call] if act is Act.LATE else delivery.calls
        if act is Act.TIME_OUT:
            delivery.clock.now += _LONG
        if act in (Act.DIE, Act.DIE_AFTER, Act.DIE_FLYING):
            delivery.kill()
        elif act is Act.BUSY:
            self._land(delivery, call, busy(call, pick))
        else:
            self._land(delivery, call, landing if act is Act.GO and landing else no_answer())
        if delivery.over:
            self._live.remove((message, delivery))
            self._ended(message, delivery)

    def _answer(self, call: Call) -> Landing:
        return self._recorder.answer(call.operation, call.body)

    def _land(self, delivery: Delivery, call: Call, landing: Landing) -> None:
        if call.operation == "TransactWriteItems" and is_unknown(landing):
            self._again[delivery, _receipt(call)] = call.body
        delivery.land(call, landing)

    def _deliver(self, message: Message) -> None:
        self._clock += 1
        work = self._tasks.work(message)
        delivery = Delivery(Clock(self._clock), lambda http, clock: work(Parts(self._site, http, clock)))
        if delivery.over:
            self._ended(message, delivery)
        else:
            self._live.append((message, delivery))

    def _ended(self, message: Message, delivery: Delivery) -> None:
        if delivery.error is None:
            self._tasks.done(message, delivery.result)
        elif not isinstance(delivery.error, Killed | Unavailable):  # with these the message comes again
            raise delivery.error


def _receipt(call: Call) -> tuple[str, str]:
    return place_of(actions_of(call.body)[-1])
