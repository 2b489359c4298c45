"""A worker is killed right before and right after each named step of the write path, and nothing is lost or doubled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

import mdstore.store.writer
import mdstore.tasks.tasks
from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from mdstore.settings import load_settings
from mdstore.store import Store
from mdstore.tasks import create_store_app
from tests.chaos.expected import Expected, families
from tests.chaos.fault_schedule import Kill
from tests.chaos.messages import Messages
from tests.chaos.worker_pool import WorkerPool, kill, worker_pool
from tests.waiting import until

AT_ONCE = 8  # cases; each waits most of its time for a message to become visible again
LANES = 4
FAMILIES = 2  # of operations, per lane
VISIBLE_AGAIN = 5  # seconds

#: The steps of a request of several lanes, in order. `step:name` is a variant of a step.
MANY = [
    "start", "chord", "publish:apply_lane", "ack:ingest",
    "fetch", "pack", "upload", "prepare", "send", "read", "read:refused", "count", "close",
    "finish:apply_lane", "part", "dispatch", "publish:finish", "ack:apply_lane",
    "finish:finish", "result", "ack:finish",
]  # fmt: skip
#: The steps of a request of one lane that differ: it is completed without a chord and a lane summary.
FEW = ["complete", "result", "ack:ingest"]


@dataclass(frozen=True)
class Case:
    """Kills during one request, one after another, each as `step moment nth`: of the worker (`group`), else of a child."""

    kills: tuple[str, ...]
    group: bool
    small: bool = False

    def __str__(self) -> str:
        who = "group" if self.group else "child"
        return "-".join([who, *(["small"] if self.small else []), *self.kills]).replace(" ", "-")


#: These steps are killed in every way. At the others the child is killed on one side of the step, the group on the other.
DECISIVE = {"publish:apply_lane", "send", "read:refused", "close", "dispatch", "complete"}


def _cases() -> Iterator[Case]:
    for small, steps in ((False, MANY), (True, FEW)):
        for number, step in enumerate(steps):
            for moment in ("before", "after"):
                for group in (True, False):
                    if step.startswith("ack:"):  # the parent acknowledges, so no child can die of it
                        chosen = group
                    else:
                        chosen = step in DECISIVE or group == ((moment == "before") == (number % 2 == 0))
                    if chosen:
                        yield Case((f"{step} {moment} 1",), group, small)
    # Kills in the middle of publishing, of a lane's waves, and of the lanes.
    for kill_step in ("publish:apply_lane after 2", "send after 3"):
        yield from (Case((kill_step,), group) for group in (True, False))
    yield from (Case((kill_step,), True) for kill_step in ("send before 3", "close after 2", "part after 2"))
    # Kills in a later delivery than the first, and several in a row.
    yield Case(("send after 1", "read:receipts before 1"), group=True)
    yield Case(("send after 1", "read:receipts after 1"), group=False)
    for group in (True, False):
        yield Case(
            ("send after 1", "send after 1", "count before 1", "publish:finish after 1", "finish:finish after 1"), group
        )


CASES = list(_cases())


class Environment:
    """One emulator and one worker pool for all cases; each case has its own queue and keys."""

    def __init__(self, aws: EmbeddedAws, workers: WorkerPool, directory: Path, **environ: str) -> None:
        self._workers = workers
        self._directory = directory
        self._environ = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": "kills",
            "MDSTORE_WAIT_TIME": "1",
            "MDSTORE_VISIBILITY_TIMEOUT": str(VISIBLE_AGAIN),
            "MDSTORE_LANE_OPERATIONS": str(len(families("any", FAMILIES))),
            "MDSTORE_MAX_RECEIVES": "50",
            **environ,
        }
        settings = load_settings(self._environ).settings
        for _ in provision(settings):
            pass
        self._store = Store(settings)  # all cases share its clients, which take half a second to make

    def run(self, name: str, case: Case) -> None:
        """Submit request `name`, execute the kills of `case`, and check the result."""
        operations = families(name, 1 if case.small else FAMILIES * LANES, large=1)
        environ = {
            **self._environ,
            "MDSTORE_QUEUE": name,
            "MDSTORE_DEAD_LETTER_QUEUE": f"{name}-dead",
        }
        app = create_store_app(load_settings(environ).settings)
        app._store = self._store
        client = Client(app=app)
        messages = Messages(self._store.aws.sqs, app.settings)
        if any("result" in one for one in case.kills):  # only Celery's callers have one stored
            client.ingest.delay(operations, request_id=name)
        else:
            assert client.submit(operations, request_id=name).new
        assert (client.status(name).lanes == 1) == case.small
        worker = self._after_kills(case, environ, name)
        try:
            client.wait(name, timeout=100)
            result = client.ingest.AsyncResult(name).get(timeout=30)
            messages.wait_until_acknowledged()
            assert worker.is_running()
        finally:
            kill(worker)
        Expected(operations).check(client, name)
        assert result == client.status(name).summary()
        self._check_events(name, case, lanes=client.status(name).lanes)

    def _after_kills(self, case: Case, environ: Mapping[str, str], name: str) -> psutil.Process:
        """Start workers until each kill has happened; returns the surviving worker, a new one if the groups were killed."""
        log = self._log(name)
        marks = self._directory / name
        kills = [
            Kill(step=step, moment=moment, nth=int(nth), group=case.group, mark=f"{marks}.{number}")  # type: ignore[arg-type]
            for number, (step, moment, nth) in enumerate(text.split() for text in case.kills)
        ]
        dying = {**environ, "KILLS": msgspec.json.encode(kills).decode()}
        worker = self._workers.start("tests.chaos.dying", dying, log)
        for one in kills:
            if not worker.is_running():
                worker = self._workers.start("tests.chaos.dying", dying, log)
            until(Path(one.mark).exists, within=100, what=f"it dies {one.moment} {one.step}")
            if case.group:
                worker.wait(timeout=60)
        return self._workers.start("workers.celery_app", environ, log) if case.group else worker

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _check_events(self, name: str, case: Case, *, lanes: int) -> None:
        """Assert that each state changed once. If the group is killed, events may be missing, as a kill may precede one."""
        log = self._log(name).read_text()
        completed = re.findall(rf"request\.completed request_id={name} ", log)
        closed = sorted(map(int, re.findall(rf"lane\.completed request_id={name} lane=(\d+) ", log)))
        assert len(completed) <= 1
        assert len(set(closed)) == len(closed)
        if not case.group:
            assert len(completed) == 1
            assert closed == (list(range(lanes)) if lanes > 1 else [])


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[None]]]:
    """Run all selected cases side by side, since they mostly wait for redeliveries; yields each case's future."""
    items = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module
    ]
    wanted: list[Case] = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]  # type: ignore[misc]
    with EmbeddedAws(port=free_port()) as aws, worker_pool() as workers, ThreadPoolExecutor(AT_ONCE) as pool:
        environment = Environment(aws, workers, tmp_path_factory.mktemp("kills"))
        yield {case: pool.submit(environment.run, f"case{CASES.index(case)}", case) for case in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_worker_loses_and_doubles_nothing(case: Case, runs: dict[Case, Future[None]]) -> None:
    """After the kills the request completes, and each operation, state change and chord callback took effect once."""
    runs[case].result(timeout=280)


def test_every_named_step_has_its_kills() -> None:
    """Child and group are killed before and after each step that the writer's docstring names, and at each task's end."""
    kills = [(text.split(), case.group) for case in CASES for text in case.kills]
    moments = {(step.partition(":")[0], moment) for (step, moment, _), _ in kills}
    assert moments >= {(step, moment) for step in _named_steps() for moment in ("before", "after")}
    victims = {(step.partition(":")[0], group) for (step, _, _), group in kills}
    assert victims >= {(step, group) for step in _named_steps() for group in (True, False)}
    tasks = re.findall(r"^(\w+)  +\S", mdstore.tasks.tasks.__doc__ or "", re.MULTILINE)
    assert tasks == ["ingest", "apply_lane", "finish"]
    acknowledged = {(step, moment) for (step, moment, _), _ in kills if step.startswith("ack:")}
    assert acknowledged == {(f"ack:{task}", moment) for task in tasks for moment in ("before", "after")}


def _named_steps() -> list[str]:
    """Return the steps listed at the head of `writer.py`; a step with steps below it is left out in favour of those."""
    _, _, after = (mdstore.store.writer.__doc__ or "").partition("    apply_lane\n")
    lines = after.partition("\n\n")[0].splitlines()
    steps = [(len(line) - len(line.lstrip()), line.split()[0]) for line in lines]
    depths = [depth for depth, _ in steps[1:]] + [0]
    return [step for (depth, step), next_depth in zip(steps, depths, strict=True) if next_depth <= depth]
