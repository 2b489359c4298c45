"""The store compared with its model: random requests through the real code, with random deliveries, faults and orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdstore.aws.clients import AwsClients
from mdstore.aws.http import SignedHttp
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.settings import load_settings
from tests.model.comparison import Comparison
from tests.model.deliveries import Clock
from tests.model.environment import BODY, GROUP, LIMITS, RULES, Environment, at_once, reader
from tests.model.network import MemoryService, RealService, Recorder, Tables
from tests.model.schedule import Step
from tests.model.strategies import contending_requests, requests, schedules
from tests.model.tasks import Message, Requests, Tasks
from tests.model.world import World
from tests.unit.endpoint import Keys
from tests.unit.fakes import MemoryObjects

lanes = st.sampled_from([3, 100, 1])  # operations per lane, roughly
pytestmark = pytest.mark.timeout(900)  # seconds; shrinking a failing example takes minutes
profile = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(autouse=True, scope="module")
def _limits() -> Iterator[None]:
    """Set limits that a few operations reach."""
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in LIMITS.items():
            patch.setattr(name, limit)
        yield


class Run:
    """One run of a world, and the comparison of its end with the model."""

    def __init__(self, environment: Environment, given_requests: Requests) -> None:
        self._environment = environment
        self._requests = given_requests
        self._recorder = Recorder(environment.service, records=environment.records, read=reader(environment))
        self._tasks = Tasks(given_requests)
        self.world = World(environment, self._recorder, self._tasks)

    def one_by_one(self, schedule: list[Step]) -> None:
        """Submit each request when the one before it is completed; each gets its share of the schedule."""
        share = -(-len(schedule) // len(self._requests))
        for number, request_id in enumerate(self._requests):
            self._tasks.submit(request_id)
            self.world.run(schedule[number * share : (number + 1) * share])
        self._end().check_one_by_one()

    def at_once(self, schedule: list[Step]) -> None:
        """Submit the first request, and once it is completed all others together."""
        for request_id in self._requests:
            self._tasks.submit(request_id)
            if len(self._tasks.seen) == 1:
                self.world.run([])
        self.world.run(schedule)
        self._end()

    def contended(self, schedule: list[Step]) -> None:
        """Do as `at_once` does, with the messages of all requests in the queue before any of them is delivered."""
        for request_id in self._requests:
            at_once(self._environment, Clock(1_700_000_000.0), self._tasks.work(Message("submit", request_id)))
            if len(self._tasks.seen) == 1:
                self.world.run([])
        self.world.run(schedule)
        self._end()

    def _end(self) -> Comparison:
        self.world.end()
        return Comparison(self._environment, self._recorder, self._tasks, self._requests)


def in_memory(lane_operations: int) -> Environment:
    # The writer's count of bytes leaves out the token and the pointers to data in S3.
    service = MemoryService(Tables(RULES.odd), actions=GROUP + 1, size=BODY + 100 + GROUP * 300)
    return Environment(objects=MemoryObjects(), service=service, lane_operations=lane_operations)


@pytest.fixture(scope="module")
def emulated() -> Iterator[Callable[[int], Environment]]:
    """Yield a function that makes environments over an emulator's process, each with its own tables and prefix."""
    with EmbeddedAws(port=free_port()) as aws:
        settings = load_settings({"AWS_ENDPOINT_URL": aws.url}).settings
        clients = AwsClients(settings)
        clients.s3.create_bucket(Bucket=settings.bucket)
        objects = clients.objects
        http = SignedHttp(service="dynamodb", region=settings.region, credentials=Keys())
        service = RealService(http, aws.url)
        numbers = count()

        def environment(lane_operations: int) -> Environment:
            name = f"run{next(numbers)}"
            made = Environment(
                objects=objects,
                service=service,
                records=f"{name}-records",
                ledger=f"{name}-ledger",
                prefix=f"{name}/",
                lane_operations=lane_operations,
            )
            service.create_table(made.records, ["pk"])
            service.create_table(made.ledger, ["pk", "sk"])
            return made

        yield environment


@settings(profile, max_examples=250)
@given(requests(), schedules(), lanes)
def test_requests_one_by_one_match_the_model(
    given_requests: Requests, schedule: list[Step], lane_operations: int
) -> None:
    """Whatever happens to the deliveries, each operation has the outcome and each record the state that the model predicts."""
    Run(in_memory(lane_operations), given_requests).one_by_one(schedule)


@settings(profile, max_examples=250)
@given(requests(most=3, operations=6), schedules(), lanes)
def test_concurrent_requests_match_the_model_in_some_order(
    given_requests: Requests, schedule: list[Step], lane_operations: int
) -> None:
    """The model allows the transactions of concurrent requests in the order in which they took effect."""
    Run(in_memory(lane_operations), given_requests).at_once(schedule)


@settings(profile, max_examples=150)
@given(contending_requests(), schedules(least=40), lanes)
def test_contending_requests_match_the_model_in_some_order(
    given_requests: Requests, schedule: list[Step], lane_operations: int
) -> None:
    """The model allows the order of transactions when most contend for keys: patches are merged again, and refusals race."""
    Run(in_memory(lane_operations), given_requests).contended(schedule)


@settings(profile, max_examples=25)
@given(given_requests=requests(with_odd=False), schedule=schedules(), lane_operations=lanes)
def test_requests_on_an_emulator_match_the_model(
    emulated: Callable[[int], Environment], given_requests: Requests, schedule: list[Step], lane_operations: int
) -> None:
    """Requests one by one match the model when an emulator's process, not this package, does conditions, updates and reads."""
    Run(emulated(lane_operations), given_requests).one_by_one(schedule)


@settings(profile, max_examples=25)
@given(given_requests=contending_requests(), schedule=schedules(least=40), lane_operations=lanes)
def test_contending_requests_on_an_emulator_match_the_model_in_some_order(
    emulated: Callable[[int], Environment], given_requests: Requests, schedule: list[Step], lane_operations: int
) -> None:
    """The model allows the order of contending transactions in an emulator's tables."""
    Run(emulated(lane_operations), given_requests).contended(schedule)
