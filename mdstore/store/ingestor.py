"""The producer's half of the way of the data: operations to a durable payload and one small message.

    accept
      draft      validate each operation, spool it, note its lane       draft
      encode     cut into lanes, compress, digest                       draft
      store      S3 PUT, refused where the request id has other content payload
      publish    one message with the reference                         queue
      accept     (none) -> accepted                                     ledger

A request is acknowledged when `publish` has returned. The ledger's note comes after it: where that is lost, the worker
makes it up, and until then `status` finds the payload.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, Literal

import msgspec

from mdstore.errors import DeploymentBroken, InvalidOperations, NotFound, Problem, RequestConflict, Unavailable
from mdstore.log import event
from mdstore.model import FINAL_STATES, MAX_AGE, Counts, Reference, Refusal, State, check_request_id, check_source
from mdstore.settings import Settings
from mdstore.store.ledger import Ledger, RequestStatus
from mdstore.store.payload import Encoded, Header, Payloads
from mdstore.store.payload_builder import OperationInput, PayloadBuilder
from mdstore.store.validation import Validator

Publish = Callable[[Reference], Any]
OnInvalid = Literal["raise", "refuse"]


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A durable request. `new` is False where the same request was stored before."""

    reference: Reference
    operations: int
    refused: dict[str, int]
    new: bool
    published: Any = None


class Ingestor:
    """Accepts requests. Safe to share between threads."""

    def __init__(
        self,
        *,
        payloads: Payloads,
        ledger: Ledger,
        validator: Validator,
        settings: Settings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._payloads = payloads
        self._ledger = ledger
        self._validator = validator
        self._settings = settings

    def accept(
        self,
        operations: Iterable[OperationInput],
        *,
        publish: Publish,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        republish: bool = False,
    ) -> Accepted:
        """Make `operations` a durable request; returns once its payload is in S3 and its message is in SQS.

        An invalid operation raises `InvalidOperations` before anything is stored; with `on_invalid="refuse"` it gets
        the outcome refused, and the others go on. Raises `RequestConflict` where `request_id` has other content. A
        request that is known already is not sent again unless `republish`; sending it again is harmless for 14 days. After
        that it is never sent: `RequestConflict` again, unless it is known to be completed.
        """
        request_id = check_request_id(request_id if request_id is not None else str(uuid.uuid4()))
        check_source(source)
        encoded = self._encode(operations, request_id, source, on_invalid)
        with closing(encoded.body):
            reference, new = self._payloads.put(encoded)
        header = encoded.header
        if not new and self._is_done_with(reference, republish=republish):
            return _accepted(reference, header, new=False)
        published = publish(reference)
        self._note(reference, header)
        return _accepted(reference, header, new=new, published=published)

    def status(self, request_id: str) -> RequestStatus:
        """The request with the counts so far. Raises `NotFound`."""
        check_request_id(request_id)
        try:
            return self._ledger.progress(request_id)
        except NotFound as unknown:
            try:
                reference = self._payloads.find(request_id)
            except NotFound:
                raise unknown from None
            header = self._payloads.header(reference)
            if self._is_too_old(header):  # it may be completed, and its note has expired
                raise unknown from None
            early = Counts(refused=header.refused_counts)
            return RequestStatus(
                request_id=request_id,
                state=State.ACCEPTED,
                source=reference.source,
                operations=header.operations,
                lanes=reference.lanes,
                reference=reference,
                early=early,
                counts=early,
                accepted_at=float(header.created_at),
            )

    def _encode(
        self, operations: Iterable[OperationInput], request_id: str, source: str, on_invalid: OnInvalid
    ) -> Encoded:
        with closing(PayloadBuilder(validator=self._validator, settings=self._settings, clock=self._clock)) as builder:
            problems = _Problems()
            for operation in operations:
                problems.note(builder.add(operation))
            if on_invalid == "raise":
                for refused in builder.refused_groups():
                    problems.note(refused)
                problems.raise_any()
            return builder.encode(request_id, source)

    def _note(self, reference: Reference, header: Header) -> None:
        try:
            self._ledger.record_accepted(reference, operations=header.operations, refused=header.refused_counts)
        except (Unavailable, DeploymentBroken) as error:
            # The request is durable: to say otherwise now would have it sent a second time under another id.
            event("request.unnoted", level=logging.WARNING, request_id=reference.request_id, error=str(error))

    def _is_too_old(self, header: Header) -> bool:
        """Whether its receipts may be gone, so that sending it again could apply it again."""
        return self._clock() - header.created_at > MAX_AGE

    def _is_done_with(self, reference: Reference, *, republish: bool) -> bool:
        """Whether the request need not be sent again. Raises `RequestConflict` where it would have to be and must not."""
        try:
            request = self._ledger.get(reference.request_id)
        except NotFound:
            request = None
        if self._is_too_old(self._payloads.header(reference)):
            if request is None or request.state is not State.COMPLETED:
                raise RequestConflict(reference.request_id, "is more than 14 days old, and not known to be completed")
            return True
        return not republish and request is not None and self._is_under_way(request)

    def _is_under_way(self, request: RequestStatus) -> bool:
        """Whether the request is completed, or was sent so lately that its message must still be on its way.

        A request that is neither is sent again: whatever it was that held it up, its receipts make that harmless.
        """
        if request.state in FINAL_STATES:
            return request.state is State.COMPLETED
        return self._clock() - (request.started_at or request.accepted_at) < self._settings.visibility_timeout


class _Problems:
    """The first hundred refusals, and the count of all."""

    def __init__(self) -> None:
        self._shown: list[Problem] = []
        self._count = 0

    def note(self, refused: Refusal | None) -> None:
        if refused is None:
            return
        self._count += 1
        if len(self._shown) < InvalidOperations.SHOWN:
            field, _, reason = refused.detail.partition(": ")
            self._shown.append(Problem(index=refused.index, field=field, reason=reason or refused.detail))

    def raise_any(self) -> None:
        if self._count:
            raise InvalidOperations(self._shown, count=self._count)


def _accepted(reference: Reference, header: Header, *, new: bool, published: Any = None) -> Accepted:
    return Accepted(
        reference=reference, operations=header.operations, refused=header.refused_counts, new=new, published=published
    )
