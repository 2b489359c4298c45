"""Compares the end of a run with the model: records, outcomes, counts, and the results of deliveries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mdstore.model import Counts, Operation, Reason, State
from mdstore.store.ledger_items import RequestStatus
from tests.model.deliveries import Clock
from tests.model.environment import RULES, Environment, Parts, at_once, known
from tests.model.history import History, Outcomes, check_prediction, require
from tests.model.model import Key, Known, Plan, States, apply
from tests.model.network import Recorder
from tests.model.tasks import Message, Requests, Tasks


class Comparison:
    """Reads the end of a run with the store's own readers, and raises unless it agrees with the history."""

    def __init__(self, environment: Environment, recorder: Recorder, tasks: Tasks, requests: Requests) -> None:
        self._tasks = tasks
        self._requests = requests
        self._history = History(requests, recorder.commits, RULES)
        at_once(environment, Clock(1_800_000_000.0), self._read)

    def _read(self, parts: Parts) -> None:
        keys = {(one.entity, one.key) for one in self._operations()}
        found = {key: known(record) for key, record in parts.records.look_up(sorted(keys)).items()}
        require(found == self._history.states, f"the records are {found}, not {self._history.states}")
        self.found: dict[Key, Known] = found
        self.outcomes: dict[str, Outcomes] = {}
        for request_id in self._requests:
            self._read_request(parts, request_id)

    def _operations(self) -> Iterable[Operation]:
        return (one for sources in self._requests.values() for one in sources if isinstance(one, Operation))

    def _read_request(self, parts: Parts, request_id: str) -> None:
        request = parts.ledger.get(request_id)
        require(request.state is State.COMPLETED, f"{request_id} is {request.state}")
        verification = parts.verifier.verify(request)
        require(verification.ok, f"{request_id}: verify finds {verification.faults}")
        outcomes = self._outcomes(parts, request)
        counts = self._counts(request_id, outcomes)
        require(request.counts == counts, f"{request_id}: counts {request.counts}, not {counts}")
        for one in self._tasks.results[Message("ingest", request_id)]:
            if isinstance(one, RequestStatus) and one.state is State.COMPLETED:
                require(one.counts == counts, f"{request_id}: a delivery returned {one.counts}, not {counts}")
        self._read_lanes(parts, request, outcomes)
        self.outcomes[request_id] = outcomes

    def _outcomes(self, parts: Parts, request: RequestStatus) -> Outcomes:
        """Return the outcomes. Check that they are the history's, or the model's for operations refused before sending."""
        request_id, sources = request.request_id, self._requests[request.request_id]
        listed = list(parts.outcomes.all(request))
        indexes = [one.index for one in listed]
        require(sorted(indexes) == list(range(len(sources))), f"{request_id}: outcomes of {indexes}")
        found = {one.index: Reason(one.reason) if one.outcome == "refused" else None for one in listed}
        early = Plan.of(sources, RULES).early
        for index, reasons in early.items():
            require(
                found[index] in reasons, f"{request_id}: operation {index} is {found[index]}, not of {set(reasons)}"
            )
        sent = {index: reason for index, reason in found.items() if index not in early}
        require(sent == self._history.outcomes(request_id), f"{request_id}: outcomes {sent} are not what took effect")
        return found

    def _read_lanes(self, parts: Parts, request: RequestStatus, outcomes: Outcomes) -> None:
        """Check that each key and each group is in one lane only, and that all deliveries of a lane counted the same."""
        lane_of: dict[object, int] = {}
        for lane in range(request.lanes):
            items = parts.payloads.lane(request.reference, lane)
            counts = self._counts(request.request_id, {item.index: outcomes[item.index] for item in items})
            for item in items:
                for name in ((item.entity, item.key), item.group):
                    require(name is None or lane_of.setdefault(name, lane) == lane, f"{name} is in several lanes")
            for one in self._tasks.results[Message("apply_lane", request.request_id, lane)]:
                require(one.counts == counts, f"a delivery of lane {lane} counted {one.counts}, not {counts}")
            for one in self._tasks.results[Message("give_up", request.request_id, lane)]:
                require(one.counts.total == len(items), f"a delivery that gave up lane {lane} counted {one.counts}")

    def _counts(self, request_id: str, outcomes: Outcomes) -> Counts:
        applied: Counter[str] = Counter()
        for index, reason in outcomes.items():
            source = self._requests[request_id][index]
            if reason is None:
                assert isinstance(source, Operation)
                applied[source.op] += 1
        refused = Counter(str(reason) for reason in outcomes.values() if reason is not None)
        return Counts(applied=dict(applied), refused=dict(refused))

    def check_one_by_one(self) -> None:
        """Raise unless outcomes and records are those of the model when requests run one after another."""
        states: States = {}
        for request_id, sources in self._requests.items():
            plan = Plan.of(sources, RULES)
            found = self.outcomes[request_id]
            refused = {index: reason for index, reason in found.items() if reason is not None}
            groups = plan.interleaved(refused)
            rest = plan.without(groups)
            legal = apply(rest, states)
            invalid = {index: frozenset({Reason.INVALID}) for unit in groups for index in unit.members}
            check_prediction(rest, legal | invalid, found)
        require(self.found == states, f"the records are {self.found}, the model's {states}")
