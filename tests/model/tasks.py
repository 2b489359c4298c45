"""The tasks of `mdstore.tasks.tasks` without Celery: what the delivery of a message does, and which messages it sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mdstore.aws.concurrent import Task
from mdstore.model import Reference, State
from mdstore.store.ledger_items import LaneSummary, RequestStatus
from tests.model.environment import Parts
from tests.model.model import OperationInput

Requests = Mapping[str, Sequence[OperationInput]]
Kind = Literal["submit", "ingest", "apply_lane", "finish", "finish_early", "give_up"]


@dataclass(frozen=True)
class Message:
    """A message to deliver: a producer's `submit`, one of the three tasks, an early `finish`, or a lane's giving up.

    `turns` counts how often it was sent again because a lane's turn was over.
    """

    kind: Kind
    request_id: str
    lane: int = 0
    turns: int = 0


class Tasks:
    """The messages that wait to be acknowledged, and all messages ever sent (`seen`), any of which may be delivered again."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._done: dict[str, set[int]] = defaultdict(set)
        self.references: dict[str, Reference] = {}
        self.waiting: list[Message] = []
        self.seen: list[Message] = []
        self.results: dict[Message, list[Any]] = defaultdict(list)

    def submit(self, request_id: str) -> None:
        """Add the message of a producer that submits a request."""
        self._send(Message("submit", request_id))

    def work(self, message: Message) -> Callable[[Parts], object]:
        """Return the work of a delivery of `message`."""
        kinds: dict[Kind, Callable[[Parts, Message], object]] = {
            "submit": self._accept,
            "ingest": self._ingest,
            "apply_lane": self._apply_lane,
            "finish": self._finish,
            "finish_early": self._finish,
            "give_up": self._give_up,
        }
        return lambda parts: kinds[message.kind](parts, message)

    def done(self, message: Message, result: object) -> None:
        """Acknowledge a message whose delivery succeeded, and send the messages that follow from it."""
        if message in self.waiting:
            self.waiting.remove(message)
        self.results[replace(message, turns=0)].append(result)
        if message.kind == "ingest":
            for lane in result if isinstance(result, list) else ():
                self._send(Message("apply_lane", message.request_id, lane))
        elif message.kind == "apply_lane":
            lanes = self._done[message.request_id]
            lanes.add(message.lane)
            if len(lanes) == self.references[message.request_id].lanes:
                self._send(Message("finish", message.request_id))

    def send_again(self, message: Message) -> None:
        """Send the message for what is left of a lane, and acknowledge the one whose turn is over."""
        self._send(replace(message, turns=message.turns + 1))
        if message in self.waiting:
            self.waiting.remove(message)

    def _send(self, message: Message) -> None:
        if message not in self.waiting:
            self.waiting.append(message)
        if message not in self.seen:
            self.seen.append(message)

    # -- the work of each kind of message

    def _accept(self, parts: Parts, message: Message) -> object:
        def publish(reference: Reference) -> None:
            self.references[reference.request_id] = reference
            self._send(Message("ingest", reference.request_id))

        operations = self._requests[message.request_id]
        return parts.ingestor.accept(operations, publish=publish, request_id=message.request_id, on_invalid="refuse")

    def _ingest(self, parts: Parts, message: Message) -> object:
        """Return the request if it has one lane or is done, else the lanes that are missing."""
        reference = self.references[message.request_id]
        if reference.lanes <= 1:
            # Half of the requests are applied as a job applies them, if they are small.
            is_in_job = sum(message.request_id.encode()) % 2
            status = parts.dynamo.run([_apply_small(parts, reference)])[0] if is_in_job else None
            return status or parts.writer.apply_request(reference, had_turns=message.turns > 0)
        header = parts.payloads.header(reference)
        request = parts.ledger.start(reference, operations=header.operations, refused=header.refused_counts)
        done = {one.lane for one in parts.ledger.lanes(message.request_id) if one.state is State.COMPLETED}
        missing = [lane for lane in range(reference.lanes) if lane not in done]
        if request.state is State.COMPLETED or not missing:
            return parts.ledger.finish(message.request_id)
        return missing

    def _apply_lane(self, parts: Parts, message: Message) -> LaneSummary:
        reference = self.references[message.request_id]
        return parts.writer.apply_lane(reference, message.lane, had_turns=message.turns > 0)

    def _finish(self, parts: Parts, message: Message) -> RequestStatus:
        return parts.ledger.finish(message.request_id)

    def _give_up(self, parts: Parts, message: Message) -> LaneSummary:
        """Give a lane up as after its last delivery, but in any state: the ledger must not lose what is done already."""
        reference = self.references[message.request_id]
        summary = parts.writer.give_up(reference, message.lane, "attempts were spent")
        parts.ledger.fail(message.request_id, "attempts were spent")
        return summary


def _apply_small(parts: Parts, reference: Reference) -> Task[RequestStatus | None]:
    payload = yield from parts.payloads.open_task(reference)
    return (yield from parts.writer.apply_small_task(payload))
