"""The write path at the producer: it turns operations into a durable payload in S3 and one small message.

    Ingestor.accept
      PayloadBuilder.add        validate each operation, buffer its line and record its key
      PayloadBuilder.encode     divide the operations into lanes, compress the lanes and compute their digests
      Payloads.put              store the payload in S3; raise if the request id already has other content
      publish                   send one message that refers to the payload
      Ledger.record_accepted    make the transition (none) -> accepted

A request is accepted once `publish` has returned. The ledger's record follows: if it is lost, the worker writes it, and until
then `status` reads the payload instead.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from typing import Any, Literal

import msgspec

from mdstore.errors import (
    DeploymentBroken,
    InvalidOperations,
    InvalidRequest,
    NotFound,
    Problem,
    RequestConflict,
    Unavailable,
)
from mdstore.log import event
from mdstore.model import MAX_AGE, Counts, Reference, Refusal, State, check_request_id, check_source
from mdstore.settings import Settings
from mdstore.store.ledger import Ledger, RequestStatus
from mdstore.store.payload import Header, Payloads
from mdstore.store.payload_builder import OperationInput, PayloadBuilder
from mdstore.store.validation import Validator

Publish = Callable[[Reference], Any]
OnInvalid = Literal["raise", "refuse"]


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A durable request. `new` is False if the same request had been stored before."""

    reference: Reference
    operations: int
    refused: dict[str, int]
    new: bool
    published: Any = None


class Ingestor:
    """Accepts requests. Threads may share it."""

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
        newest_wins: bool = False,
        republish: bool = False,
    ) -> Accepted:
        """Make `operations` a durable request; return once its payload is in S3 and its message is in SQS.

        A request without operations raises `InvalidRequest`. An invalid operation raises `InvalidOperations` before anything is
        stored, unless the same request was accepted before. With `on_invalid="refuse"` it gets the outcome `refused` instead,
        and the other operations are accepted. With `newest_wins`, each key ends in the state of its operation with the highest
        sequence, in whatever order requests are applied: see `store.newest_wins`.

        Raises `RequestConflict` if `request_id` already has other content. A known request is published again only if it failed
        or its lease is over, or with `republish`; publishing again is harmless for 14 days. An older request is never published
        again: it raises `RequestConflict`, unless the ledger knows that it is completed.
        """
        reference, header, new = self._store(operations, request_id, source, on_invalid, newest_wins)
        if not new and self._may_skip_publishing(reference, header, republish=republish):
            return _accepted(reference, header, new=False)
        try:
            published = publish(reference)
        except (Unavailable, DeploymentBroken) as error:
            if not new and not republish:
                self._record_unsent(reference, error)
            raise
        self._record_accepted(reference, header)
        return _accepted(reference, header, new=new, published=published)

    def prepare(
        self,
        operations: Iterable[OperationInput],
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        newest_wins: bool = False,
    ) -> Reference:
        """Store `operations` as `accept` does, and return the reference that whoever publishes the request later must send."""
        reference, _, _ = self._store(operations, request_id, source, on_invalid, newest_wins, is_follow_up=True)
        return reference

    def status(self, request_id: str) -> RequestStatus:
        """Return the state of a request, with the counts so far. Raises `NotFound`."""
        check_request_id(request_id)
        try:
            return self._ledger.progress(request_id)
        except NotFound as unknown:
            try:
                reference, header = self._payloads.find(request_id)
            except NotFound:
                raise unknown from None
            if self._is_too_old(header):  # it may have completed, and its ledger item has expired
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

    def _accepted_before(self, request_id: str | None) -> int:
        """Return the number of operations of a request that was accepted before, or 0 if there is no such request."""
        if request_id is None:
            return 0
        try:
            _, header = self._payloads.find(request_id)
        except NotFound:
            return 0
        return header.operations

    def _store(
        self,
        operations: Iterable[OperationInput],
        request_id: str | None,
        source: str,
        on_invalid: OnInvalid,
        newest_wins: bool,
        *,
        is_follow_up: bool = False,
    ) -> tuple[Reference, Header, bool]:
        """Store a request's payload. Return its reference, its header, and whether it was stored now."""
        given_id = request_id
        request_id = check_request_id(request_id if request_id is not None else str(uuid.uuid4()))
        check_source(source)
        builder = PayloadBuilder(
            validator=self._validator,
            settings=self._settings,
            newest_wins=newest_wins,
            is_follow_up=is_follow_up,
            clock=self._clock,
        )
        with closing(builder):
            problems = _Problems(lambda: self._accepted_before(given_id))
            invalid = _add(builder, operations, on_invalid, problems)
            if invalid and given_id is None:
                raise invalid
            reference, header, new = self._stored(request_id, source, builder, invalid)
        self._validator.entities.report_other_models(header.models, request_id=request_id, source=source)
        return reference, header, new

    def _stored(
        self, request_id: str, source: str, builder: PayloadBuilder, invalid: InvalidRequest | None
    ) -> tuple[Reference, Header, bool]:
        """Return a request's payload, its header, and whether it was stored now. An `invalid` one is not stored."""
        if invalid:  # unless the same request was accepted before, perhaps by another release or with another model
            with suppress(NotFound, RequestConflict):
                return *self._payloads.known(request_id, source=source, contents=builder.contents()), False
            raise invalid
        encoded = builder.encode(request_id, source)
        with closing(encoded.body):
            try:
                return self._payloads.put(encoded)
            except RequestConflict:  # unless release 0.1.0 stored it, which had another digest
                return *self._payloads.known(request_id, source=source, contents=builder.contents()), False

    def _record_accepted(self, reference: Reference, header: Header) -> None:
        try:
            self._ledger.record_accepted(reference, operations=header.operations, refused=header.refused_counts)
        except (Unavailable, DeploymentBroken) as error:
            # The request is durable. An error here would make the caller submit it again under another id.
            event("request.unnoted", level=logging.WARNING, request_id=reference.request_id, error=str(error))

    def _is_too_old(self, header: Header) -> bool:
        """Return whether the request's receipts may have expired, so that publishing it again could apply it twice."""
        return self._clock() - header.created_at > MAX_AGE

    def _may_skip_publishing(self, reference: Reference, header: Header, *, republish: bool) -> bool:
        """Return whether a known request need not be published. Raises `RequestConflict` if it is too old and not completed."""
        try:
            request = self._ledger.get(reference.request_id)
        except NotFound:
            request = None
        if self._is_too_old(header):
            if request is None or request.state is not State.COMPLETED:
                raise RequestConflict(reference.request_id, "is more than 14 days old, and not known to be completed")
            return True
        return not republish and request is not None and not self._take_over(request)

    def _take_over(self, request: RequestStatus) -> bool:
        """Return whether the caller must send a known request again: no worker or other caller takes care of it.

        The request may have lost its message. If it has not, its receipts make the second message harmless.
        """
        lease = self._settings.request_lease
        if request.is_abandoned(self._clock(), lease):
            request = self._ledger.progress(request.request_id)  # a lane may have ended since the request started
        return request.is_abandoned(self._clock(), lease) and self._ledger.reopen(request)

    def _record_unsent(self, reference: Reference, error: Exception) -> None:
        """Record that a request could not be sent again, so that the next repeat need not wait for the lease to end."""
        with suppress(Unavailable, DeploymentBroken, NotFound):
            self._ledger.fail(reference.request_id, f"the request could not be sent again: {error}")


def _add(
    builder: PayloadBuilder, operations: Iterable[OperationInput], on_invalid: OnInvalid, problems: _Problems
) -> InvalidRequest | None:
    """Add operations to a payload; return the error that makes the request invalid, if any."""
    for operation in operations:
        refused = builder.add(operation)
        if refused and on_invalid == "raise":
            problems.add(refused)
    if on_invalid == "raise":
        for refused in builder.refused_groups():
            problems.add(refused)
    if not builder.count:
        return InvalidRequest(field="operations", value=0, expected="at least one operation")
    return problems.error()


class _Problems:
    """Collects refusals: the first 100, and their count.

    After a thousand of them it raises `InvalidOperations`, so that the rest of the request is not read. But a repeat of an
    accepted request is read to its end: `accepted_before` returns how many operations that request has.
    """

    def __init__(self, accepted_before: Callable[[], int]) -> None:
        self._shown: list[Problem] = []
        self._count = 0
        self._accepted_before = accepted_before
        self._enough = InvalidOperations.ENOUGH

    def add(self, refused: Refusal) -> None:
        self._count += 1
        if len(self._shown) < InvalidOperations.SHOWN:
            field, _, reason = refused.detail.partition(": ")
            self._shown.append(Problem(index=refused.index, field=field, reason=reason or refused.detail))
        if self._count == InvalidOperations.ENOUGH:
            self._enough = max(self._enough, self._accepted_before())
        if self._count >= self._enough:
            raise InvalidOperations(self._shown, count=self._count)

    def error(self) -> InvalidOperations | None:
        return InvalidOperations(self._shown, count=self._count) if self._count else None


def _accepted(reference: Reference, header: Header, *, new: bool, published: Any = None) -> Accepted:
    return Accepted(
        reference=reference, operations=header.operations, refused=header.refused_counts, new=new, published=published
    )
