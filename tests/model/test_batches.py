"""Batches: whichever step a producer or worker dies or stalls at, each accepted request takes effect once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import IO, Any

import pytest

from mdstore.aws.http import Response
from mdstore.errors import LaneUnfinished, NotFound, RequestConflict
from mdstore.model import Counts, Operation, OpName, Reference, State
from mdstore.store.group_commit import GroupCommit, Waiting
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.records import Record
from mdstore.store.verify import Verification
from tests.model.deliveries import Call, Clock, Delivery
from tests.model.environment import RULES, Environment, Parts, at_once
from tests.model.network import MemoryService, Tables, failure
from tests.unit.fakes import MemoryObjects

#: What a process does, given the store's parts and the function that publishes.
Work = Callable[[Parts, Callable[[Reference], Any]], Any]
NOW = 1_700_000_000.0
#: The requests of a commit, by id. Each adds its own field to one record, and writes a record of its own.
REQUESTS: dict[str, list[Operation]] = {
    name: [
        Operation(op="upsert", entity="e", key=name, data={"n": 1}),
        Operation(op="patch", entity="e", key="shared", data={name: 1}),
        Operation(op="update", entity="e", key="nothing", data={"n": 1}),
    ]
    for name in ("r1", "r2", "r3")
}
SHARED = {"first": [Operation(op="insert", entity="e", key="shared", data={"n": 0})]}


class GatedObjects(MemoryObjects):
    """Objects of which each call blocks before and after it takes effect, until the test lets it go on."""

    def __init__(self, stored: dict[str, bytes], delivery: Delivery) -> None:
        super().__init__()
        self.stored = stored
        self._delivery = delivery

    def put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        wait(self._delivery, "put")
        stored = super().put_new(key, body)
        wait(self._delivery, "put done")
        return stored

    def get(self, key: str, start: int, end: int) -> bytes:
        wait(self._delivery, "get")
        return super().get(key, start, end)


def wait(delivery: Delivery, step: str) -> None:
    """Block until the test lets the work go on."""
    delivery.first_finished([Call(step, b"")])


@dataclass
class World:
    """One run: its tables and objects, and the messages that were sent."""

    environment: Environment = field(
        default_factory=lambda: Environment(
            objects=MemoryObjects(),
            service=MemoryService(Tables(RULES.odd), actions=100, size=2**20),
            lane_operations=100,
        )
    )
    sent: list[Reference] = field(default_factory=list)

    def start(self, work: Work) -> Delivery:
        """Start work whose every step blocks."""

        def run(http: Any, clock: Clock) -> Any:
            delivery = http._delivery
            objects = GatedObjects(self.environment.objects.stored, delivery)  # type: ignore[attr-defined]

            def publish(reference: Reference) -> str:
                wait(delivery, "publish")
                self.sent.append(reference)
                wait(delivery, "publish done")
                return reference.request_id

            return work(Parts(replace(self.environment, objects=objects), http, clock), publish)

        return Delivery(Clock(NOW), run)

    def go_on(self, delivery: Delivery, steps: int = 1_000, *, throttled: Callable[[], bool] = lambda: False) -> int:
        """Let work take up to `steps` steps; return how many it took. Calls to DynamoDB that are `throttled` have no effect."""
        for taken in range(steps):
            if delivery.over:
                return taken
            call = delivery.calls[0]
            if not call.operation[0].isupper():
                answer = Response(200, [], b"")
            elif throttled():
                answer = failure("ThrottlingException")
            else:
                answer = self.environment.service.answer(call.operation, call.body)
            delivery.finish_call(call, answer)
        return steps

    def take_effect(self, delivery: Delivery) -> None:
        """Let the call that is under way take effect, although nobody will get its answer."""
        call = delivery.calls[0]
        if call.operation[0].isupper():
            self.environment.service.answer(call.operation, call.body)

    def finish(self, delivery: Delivery) -> Any:
        """Let work go on to its end, and return its result."""
        self.go_on(delivery)
        assert delivery.over
        if delivery.error is not None:
            raise delivery.error
        return delivery.result

    def apply(self) -> None:
        """Deliver each message twice."""
        for reference in [*self.sent, *self.sent]:
            self.finish(self.start(applying(reference)))

    def status(self, request_id: str) -> RequestStatus:
        """Return the state of a request."""
        found: RequestStatus = self.ask(lambda parts: parts.ingestor.status(request_id))
        return found

    def outcomes(self, request_id: str) -> list[tuple[int, str, str]]:
        """Return the outcomes of a request: index, outcome and key of each."""
        status = self.status(request_id)
        found = self.ask(lambda parts: list(parts.outcomes.all(status)))
        return sorted((one.index, one.outcome, one.key) for one in found)

    def record(self, key: str) -> Record:
        """Return a record of the entity `e`."""
        found: Record = self.ask(lambda parts: parts.records.get("e", key))
        return found

    def ask(self, question: Callable[[Parts], Any]) -> Any:
        """Return the answer of a store whose calls are answered at once."""
        return at_once(self.environment, Clock(NOW), question)

    def check(self, request_ids: Sequence[str]) -> None:
        """Check that each request is completed, with its own counts and outcomes, and took effect once."""
        for request_id in request_ids:
            status = self.status(request_id)
            assert status.state is State.COMPLETED, request_id
            assert status.counts == Counts(applied={"patch": 1, "upsert": 1}, refused={"missing": 1})
            expected = [(0, "applied", request_id), (1, "applied", "shared"), (2, "refused", "nothing")]
            assert self.outcomes(request_id) == expected
            verification = self.ask(partial(verified, status))
            assert verification.ok, verification.faults
            record = self.record(request_id)
            assert (record.version, record.updated_by.partition("/")[0]) == (1, request_id)
        shared = self.record("shared")
        assert shared.version == 1 + len(request_ids)
        assert shared.data == {"n": 0, **dict.fromkeys(request_ids, 1)}


def verified(status: RequestStatus, parts: Parts) -> Verification:
    """Verify a request."""
    return parts.verifier.verify(status)


def applying(reference: Reference) -> Work:
    """Return the work of a worker that applies a message, in as many turns as it takes."""

    def work(parts: Parts, _: object) -> RequestStatus:
        had_turns = False
        while True:
            try:
                return parts.writer.apply_request(reference, had_turns=had_turns)
            except LaneUnfinished:
                had_turns = True

    return work


def commit(requests: dict[str, list[Operation]]) -> Work:
    """Return work that submits requests together, and returns them."""

    def work(parts: Parts, publish: Callable[[Reference], Any]) -> list[Waiting]:
        group = GroupCommit(ingestor=parts.ingestor, payloads=parts.payloads, ledger=parts.ledger, publish=publish)
        waiting = [group.add(parts.ingestor.build(some, request_id=name)) for name, some in requests.items()]
        while not group.is_idle:
            group.commit()
        return waiting

    return work


@pytest.fixture
def world() -> World:
    return made_world()


def made_world() -> World:
    """Return a world that has the record `shared`."""
    made = World()
    made.finish(made.start(commit(SHARED)))
    made.apply()
    made.sent.clear()
    return made


def steps_of(requests: dict[str, list[Operation]]) -> int:
    """Return how many steps a commit has."""
    counted = made_world()
    return counted.go_on(counted.start(commit(requests)))


def test_requests_that_wait_together_share_one_payload_and_one_message(world: World) -> None:
    """Each has its own state, counts and outcomes, and the record names the request that wrote it."""
    accepted = [one.accepted.result() for one in world.finish(world.start(commit(REQUESTS)))]
    assert [(one.request_id, one.operations, one.new) for one in accepted] == [(name, 3, True) for name in REQUESTS]
    (reference,) = world.sent
    assert {one.reference for one in accepted} == {reference}
    world.apply()
    world.check([*REQUESTS])


@pytest.mark.parametrize("takes_effect", [False, True])
def test_a_producer_that_dies_at_any_step_loses_nothing(takes_effect: bool) -> None:
    """Whoever repeats the requests has them accepted, and each takes effect once."""
    for step in range(steps_of(REQUESTS)):
        world = made_world()
        first = world.start(commit(REQUESTS))
        world.go_on(first, step)
        if takes_effect:
            world.take_effect(first)
        first.kill()
        repeated = [one.accepted.result() for one in world.finish(world.start(commit(REQUESTS)))]
        assert [one.request_id for one in repeated] == [*REQUESTS], step
        world.apply()
        world.check([*REQUESTS])


def test_a_producer_that_stalls_at_any_step_commits_nothing_twice() -> None:
    """Another producer repeats its requests meanwhile; all submitters are told that their requests are accepted."""
    for step in range(steps_of(REQUESTS)):
        world = made_world()
        first = world.start(commit(REQUESTS))
        world.go_on(first, step)
        world.finish(world.start(commit(REQUESTS)))
        world.apply()
        for waiting in world.finish(first):
            assert waiting.accepted.result().request_id in REQUESTS, step
        world.apply()
        world.check([*REQUESTS])


def test_two_producers_commit_the_same_requests_at_once() -> None:
    """In whatever way their steps alternate, each request takes effect once."""
    for stride in range(1, 8):
        for lead in range(0, 12):
            world = made_world()
            first, second = world.start(commit(REQUESTS)), world.start(commit(REQUESTS))
            world.go_on(first, lead)
            while not (first.over and second.over):
                world.go_on(second, stride)
                world.go_on(first, stride)
            for delivery in (first, second):
                for waiting in world.finish(delivery):
                    assert waiting.accepted.result().request_id in REQUESTS
            world.apply()
            world.check([*REQUESTS])


@pytest.mark.parametrize("takes_effect", [False, True])
def test_a_worker_that_dies_at_any_step_of_a_batch_loses_nothing(takes_effect: bool) -> None:
    """The message is delivered again, and each operation applies once."""
    for step in count():
        world = made_world()
        world.finish(world.start(commit(REQUESTS)))
        (reference,) = world.sent
        worker = world.start(applying(reference))
        world.go_on(worker, step)
        if worker.over:
            break
        if takes_effect:
            world.take_effect(worker)
        worker.kill()
        world.apply()
        world.check([*REQUESTS])
    assert step > 5


def test_one_request_does_not_fail_its_neighbours(world: World) -> None:
    """A conflict and a repeat are answered on their own account; the others are accepted."""
    world.finish(world.start(commit({"r1": REQUESTS["r1"]})))
    world.apply()
    other = [Operation(op="upsert", entity="e", key="r2", data={"n": 2})]
    world.finish(world.start(commit({"r2": REQUESTS["r2"], "r4": SHARED["first"]})))
    waiting = world.finish(world.start(commit({"r1": REQUESTS["r1"], "r2": other, "r3": REQUESTS["r3"]})))
    known, conflict, new = [one.accepted for one in waiting]
    assert (known.result().new, known.result().published) == (False, None)
    with pytest.raises(RequestConflict, match="'r2' was accepted before with other content"):
        conflict.result()
    assert new.result().new
    world.apply()
    world.check(["r1", "r2", "r3"])


def test_an_id_that_is_used_twice_at_once_is_one_request(world: World) -> None:
    """The same content is accepted twice and applied once; other content is a conflict."""

    def work(parts: Parts, publish: Callable[[Reference], Any]) -> list[Waiting]:
        group = GroupCommit(ingestor=parts.ingestor, payloads=parts.payloads, ledger=parts.ledger, publish=publish)
        other = [Operation(op="upsert", entity="e", key="r1", data={"n": 2})]
        contents = [REQUESTS["r1"], REQUESTS["r1"], other]
        waiting = [group.add(parts.ingestor.build(some, request_id="r1")) for some in contents]
        waiting += [group.add(parts.ingestor.build(REQUESTS[name], request_id=name)) for name in ("r2", "r3")]
        while not group.is_idle:
            group.commit()
        return waiting

    first, same, other, *_ = [one.accepted for one in world.finish(world.start(work))]
    assert (first.result().new, same.result().new) == (True, False)
    with pytest.raises(RequestConflict):
        other.result()
    world.apply()
    world.check([*REQUESTS])


def test_groups_of_different_requests_stay_apart(world: World) -> None:
    """Requests that use the same name for a group share neither its fate nor its limit."""
    ops: dict[str, OpName] = {"r1": "update", "r2": "upsert"}
    requests = {
        name: [
            Operation(op="upsert", entity="e", key=f"{name}-a", data={"n": 1}, group="g"),
            Operation(op=op, entity="e", key=f"{name}-b", data={"n": 1}, group="g"),
        ]
        for name, op in ops.items()
    }
    world.finish(world.start(commit(requests)))
    world.apply()
    found = {name: world.status(name).counts for name in requests}
    assert (found["r1"].applied, found["r1"].refused) == ({}, {"group_refused": 1, "missing": 1})
    assert found["r2"].applied == {"upsert": 2}


def test_refused_operations_of_a_batch_belong_to_their_requests(world: World) -> None:
    """Operations that are refused before the batch is published have their indexes in their own request."""

    def work(parts: Parts, publish: Callable[[Reference], Any]) -> None:
        group = GroupCommit(ingestor=parts.ingestor, payloads=parts.payloads, ledger=parts.ledger, publish=publish)
        for name in ("r1", "r2"):
            lines = [b'{"op":"upsert","entity":"e","key":"%b","data":{"n":1}}' % name.encode(), b'{"op":']
            group.add(parts.ingestor.build(lines, request_id=name, on_invalid="refuse"))
        group.commit()

    world.finish(world.start(work))
    for expected in ([(1, "refused")], [(0, "applied"), (1, "refused")]):
        for name in ("r1", "r2"):
            assert [(index, outcome) for index, outcome, _ in world.outcomes(name)] == expected
        world.apply()


def test_a_batch_that_fails_names_each_request(world: World) -> None:
    """Its requests fail with the reason, and complete if the batch is applied later."""
    world.finish(world.start(commit(REQUESTS)))
    (reference,) = world.sent
    world.finish(world.start(lambda parts, _: parts.writer.fail_batch(reference, "the table is missing")))
    for name in REQUESTS:
        status = world.status(name)
        assert (status.state, status.error, status.counts.failed) == (State.FAILED, "the table is missing", 3)
        assert {outcome for _, outcome, _ in world.outcomes(name)} == {"failed"}
    world.apply()
    world.check([*REQUESTS])


@pytest.mark.parametrize("seed", range(10))
def test_throttled_calls_are_made_again(seed: int) -> None:
    """With 30 % of the calls throttled, producer and worker come to the same end."""
    chosen = random.Random(seed)
    world = made_world()

    def throttled() -> bool:
        return chosen.random() < 0.3

    producer = world.start(commit(REQUESTS))
    world.go_on(producer, throttled=throttled)
    world.finish(producer)
    (reference,) = world.sent
    worker = world.start(applying(reference))
    world.go_on(worker, throttled=throttled)
    world.finish(worker)
    world.check([*REQUESTS])


def test_a_hostile_request_of_a_batch_is_refused_alone(world: World) -> None:
    """An operation that DynamoDB rejects as malformed is refused, without a trace in the other requests."""
    hostile = [Operation(op="upsert", entity=RULES.odd, key="a", data={"n": 1})]
    world.finish(world.start(commit({**REQUESTS, "r4": hostile})))
    world.apply()
    assert world.status("r4").counts == Counts(refused={"invalid": 1})
    assert world.outcomes("r4") == [(0, "refused", "a")]
    world.check([*REQUESTS])


def test_a_request_whose_submitter_has_gone_is_not_committed(world: World) -> None:
    """It was not acknowledged, so nothing of it is stored; the others are."""

    def work(parts: Parts, publish: Callable[[Reference], Any]) -> list[Waiting]:
        group = GroupCommit(ingestor=parts.ingestor, payloads=parts.payloads, ledger=parts.ledger, publish=publish)
        waiting = [group.add(parts.ingestor.build(some, request_id=name)) for name, some in REQUESTS.items()]
        assert waiting[0].accepted.cancel()
        group.commit()
        return waiting

    _, *others = world.finish(world.start(work))
    assert [one.accepted.result().request_id for one in others] == ["r2", "r3"]
    with pytest.raises(NotFound):
        world.status("r1")
