"""The write path at the producer: it turns operations into a durable payload in S3 and one small message.

    Ingestor.accept
      PayloadBuilder.add        validate each operation, buffer its line and record its key
      PayloadBuilder.encode     divide the operations into lanes, compress the lanes and compute their digests
      Ledger.note               make the transition (none) -> accepted, unless the request id is taken
      Payloads.put              store the payload in S3
      publish                   send one message that refers to the payload

A request is accepted once `publish` has returned. Its note in the ledger decides about its id: whoever writes it first owns the
id, and all others repeat the request, or conflict with it. A note does not prove that the payload was stored or the message
sent. So a repeat makes sure of both, until the request has begun.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import msgspec

from mdstore.aws.concurrent import Task
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
from mdstore.store.batch import encode_batch
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.payload import Encoded, Header, Payloads
from mdstore.store.payload_builder import OperationInput, PayloadBuilder
from mdstore.store.validation import Validator

Publish = Callable[[Reference], Any]
OnInvalid = Literal["raise", "refuse"]

_TOO_OLD = "is more than 14 days old, and not known to be completed"
#: Seconds between looks for the payload of a batch that may be about to be stored.
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.4)


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A durable request. `new` is False if the same request had been accepted before.

    `published` is what `publish` returned, or None if no message had to be sent.
    """

    request_id: str
    reference: Reference
    operations: int
    refused: dict[str, int]
    new: bool
    published: Any = None


class NewId(str):
    """A request id that was just made, and that nobody else knows. So no other request can have it."""

    __slots__ = ()


def new_id(prefix: str = "") -> NewId:
    """Make the id of a request whose caller gives none."""
    return NewId(f"{prefix}{uuid.uuid4()}")


@dataclass(frozen=True, kw_only=True)
class BuiltRequest:
    """A request whose operations were read and checked, and of which nothing is stored yet.

    `has_new_id` means that no other request can have its id. `invalid` is why it cannot be accepted, unless it was accepted
    before. Whoever built it must close `builder`.
    """

    request_id: str
    source: str
    builder: PayloadBuilder
    has_new_id: bool = False
    invalid: InvalidRequest | None = None


class _Reason(Enum):
    """Tells why a repeat sends the message of its request."""

    ASKED = "the caller asked for it"
    UNPROVEN = "it may never have been sent"
    ABANDONED = "it was lost, or the request failed"


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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
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
        built = self.build(
            operations, request_id=request_id, source=source, on_invalid=on_invalid, newest_wins=newest_wins
        )
        with closing(built.builder):
            return self.accept_built(built, publish=publish, republish=republish)

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
        built = self.build(
            operations,
            request_id=request_id,
            source=source,
            on_invalid=on_invalid,
            newest_wins=newest_wins,
            is_follow_up=True,
        )
        with closing(built.builder):
            accepted = self.accept_built(built, publish=_leave_unpublished)
        return self._payloads.resolved(accepted.reference)

    def build(
        self,
        operations: Iterable[OperationInput],
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        newest_wins: bool = False,
        is_follow_up: bool = False,
    ) -> BuiltRequest:
        """Read and check the operations of a request, and store nothing. Raises the errors of `accept` about invalid ones."""
        given_id = None if isinstance(request_id, NewId) else request_id
        request_id = check_request_id(new_id() if request_id is None else request_id)
        check_source(source)
        builder = PayloadBuilder(
            validator=self._validator,
            settings=self._settings,
            newest_wins=newest_wins,
            is_follow_up=is_follow_up,
            clock=self._clock,
        )
        with ExitStack() as on_error:
            on_error.callback(builder.close)
            problems = _Problems(lambda: self._accepted_before(given_id))
            invalid = _add(builder, operations, on_invalid, problems)
            if invalid and given_id is None:
                raise invalid
            on_error.pop_all()
        return BuiltRequest(
            request_id=str(request_id),
            source=source,
            builder=builder,
            has_new_id=given_id is None,
            invalid=invalid,
        )

    def accept_built(
        self, built: BuiltRequest, *, publish: Publish, republish: bool = False, replaces: str = ""
    ) -> Accepted:
        """Do what `accept` does for a request that was built. `replaces` is the void batch that it was noted for, if any."""
        if built.invalid:
            return self._repeat_invalid(built, built.invalid, publish, republish=republish)
        encoded = self.encode(built)
        with closing(encoded.body):
            known = self._ledger.run([self.note_task(built, self._payloads.reference(encoded), replaces=replaces)])[0]
            if known is None:
                return self.finish(built, encoded, publish=publish)
        return self.repeat(built, known, publish=publish, republish=republish)

    def encode(self, built: BuiltRequest) -> Encoded:
        """Encode the payload of a request of its own. Its user must close the body."""
        return built.builder.encode(built.request_id, built.source)

    def encode_batch(self, batch_id: str, source: str, requests: Sequence[tuple[str, PayloadBuilder]]) -> Encoded:
        """Encode the payload of several requests. Its user must close the body."""
        models = self._validator.entities.digest
        return encode_batch(batch_id, source, requests, created_at=int(self._clock()), models=models)

    def note_task(self, built: BuiltRequest, reference: Reference, *, replaces: str = "") -> Task[RequestStatus | None]:
        """Task: note a request as accepted, with the payload of `reference`. Return the request that has its id, or None."""
        builder = built.builder
        return self._ledger.note_task(
            built.request_id,
            reference,
            content=builder.content,
            operations=builder.count,
            refused=builder.refused_counts,
            is_follow_up=builder.is_follow_up,
            replaces=replaces,
        )

    def finish(self, built: BuiltRequest, encoded: Encoded, *, publish: Publish, is_stored: bool = False) -> Accepted:
        """Store the payload of a request that was noted, unless it is stored already, and publish it."""
        if is_stored:
            reference, header, new = self._payloads.reference(encoded), encoded.header, True
        else:
            reference, header, new = self._put(built, encoded)
        published = publish(reference)
        event("request.accepted", request_id=built.request_id, operations=header.operations, lanes=reference.lanes)
        return Accepted(
            request_id=built.request_id,
            reference=reference,
            operations=header.operations,
            refused=header.refused_counts,
            new=new,
            published=published,
        )

    def repeat(
        self, built: BuiltRequest, known: RequestStatus, *, publish: Publish, republish: bool = False
    ) -> Accepted:
        """Accept a request whose id the request `known` has: make sure that this one is durable, if it is the same.

        Raises `RequestConflict` if it is another one, or too old.
        """
        self._check_same(built, known)
        reason = self._reason_to_send(known, republish=republish)
        if reason is None:
            return _repeated(known)
        try:
            reference = self._durable(built, known)
            if reference is None:
                return self.accept_built(built, publish=publish, replaces=known.reference.request_id)
            published = publish(reference)
        except (Unavailable, DeploymentBroken) as error:
            if reason is _Reason.ABANDONED:
                self._record_unsent(known, error)
            raise
        if reason is _Reason.UNPROVEN:
            self._ledger.reopen(known)
        return _repeated(known, reference, published=published)

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
            if self._is_too_old(header.created_at):  # it may have completed, and its ledger item has expired
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
                content=header.content,
            )

    def _accepted_before(self, request_id: str | None) -> int:
        """Return the number of operations of a request that was accepted before, or 0 if there is no such request."""
        if request_id is None:
            return 0
        try:
            return self.status(request_id).operations
        except NotFound:
            return 0

    def _repeat_invalid(
        self, built: BuiltRequest, invalid: InvalidRequest, publish: Publish, *, republish: bool
    ) -> Accepted:
        """Accept a request that is invalid now, if it was accepted before, perhaps with another model. Else raise `invalid`."""
        with suppress(NotFound, RequestConflict):
            known = self.status(built.request_id)
            return self.repeat(built, known, publish=publish, republish=republish)
        raise invalid

    def _put(self, built: BuiltRequest, encoded: Encoded) -> tuple[Reference, Header, bool]:
        """Store the payload of a request that was noted. Return what is stored, and whether it was stored now."""
        try:
            reference, header, new = self._put_or_find(built, encoded)
        except RequestConflict:
            self._ledger.withdraw(built.request_id, built.builder.content)
            raise
        if not new:  # the ledger did not know it
            self._ledger.correct(reference)
            self._report_models(reference, header)
        return reference, header, new

    def _put_or_find(self, built: BuiltRequest, encoded: Encoded) -> tuple[Reference, Header, bool]:
        try:
            reference, header, new = self._payloads.put(encoded)
        except RequestConflict:  # unless release 0.1.0 stored it, which had another digest
            contents = built.builder.contents()
            reference, header = self._payloads.known(built.request_id, source=built.source, contents=contents)
            new = False
        if not new and self._is_too_old(header.created_at):
            raise RequestConflict(built.request_id, _TOO_OLD)
        return reference, header, new

    def _check_same(self, built: BuiltRequest, known: RequestStatus) -> None:
        """Raise `RequestConflict` unless `known` is the same request as the one that was built, and can be repeated."""
        if known.source != built.source:
            raise RequestConflict(built.request_id)
        if known.content != built.builder.content:  # unless release 0.1.0 accepted it, which had another digest or none
            contents = built.builder.contents()
            if known.content and known.content not in contents:
                raise RequestConflict(built.request_id)
            if not known.content:
                with suppress(NotFound):  # the payload has expired
                    self._payloads.known(built.request_id, source=built.source, contents=contents)
        if known.state is not State.COMPLETED and self._is_too_old(known.accepted_at):
            raise RequestConflict(built.request_id, _TOO_OLD)

    def _reason_to_send(self, known: RequestStatus, *, republish: bool) -> _Reason | None:
        """Return why a repeat must send the message of a request, or None if it need not."""
        if self._is_too_old(known.accepted_at):
            return None
        if republish:
            return _Reason.ASKED
        has_not_begun = known.state is State.ACCEPTED and not known.sent_again
        if has_not_begun and not (known.is_batched and self._ledger.was_sent(known.reference.request_id)):
            return _Reason.UNPROVEN
        return _Reason.ABANDONED if self._take_over(known) else None

    def _durable(self, built: BuiltRequest, known: RequestStatus) -> Reference | None:
        """Return the reference to the payload of a known request. Store the payload if it is missing.

        Return None if the request belongs to a batch that was not stored, and now never will be: whoever wanted to store it
        has died, or finds an empty batch in its place, and accepts its requests one by one.
        """
        if not known.is_batched:
            try:
                reference, header = self._payloads.find(known.request_id)
            except NotFound:
                encoded = self.encode(built)
                with closing(encoded.body):
                    reference, _, new = self._put(built, encoded)
                if new:  # the note names a payload that was never stored
                    self._ledger.correct(reference)
                return reference
            self._report_models(reference, header)
            return reference
        batch_id = known.reference.request_id
        for pause in _PAUSES:
            with suppress(NotFound):
                reference, header = self._payloads.find(batch_id)
                break
            self._sleep(pause)
        else:
            empty = self.encode_batch(batch_id, known.source, ())
            with closing(empty.body):
                self._payloads.put_batch(empty)
            reference, header = self._payloads.find(batch_id)
        if header.batched(known.request_id) is None:
            return None
        self._report_models(reference, header)
        return reference

    def _report_models(self, reference: Reference, header: Header) -> None:
        """Log a warning if a known request was checked against other models than those of this process."""
        self._validator.entities.report_other_models(
            header.models, request_id=reference.request_id, source=reference.source
        )

    def _is_too_old(self, accepted_at: float) -> bool:
        """Return whether the request's receipts may have expired, so that publishing it again could apply it twice."""
        return self._clock() - accepted_at > MAX_AGE

    def _take_over(self, request: RequestStatus) -> bool:
        """Return whether the caller must send a known request again: no worker or other caller takes care of it.

        The request may have lost its message. If it has not, its receipts make the second message harmless.
        """
        lease = self._settings.request_lease
        if request.is_abandoned(self._clock(), lease):
            request = self._ledger.progress(request.request_id)  # a lane may have ended since the request started
        return request.is_abandoned(self._clock(), lease) and self._ledger.reopen(request)

    def _record_unsent(self, known: RequestStatus, error: Exception) -> None:
        """Record that a request could not be sent again, so that the next repeat need not wait for the lease to end."""
        with suppress(Unavailable, DeploymentBroken, NotFound):
            self._ledger.fail(known.request_id, f"the request could not be sent again: {error}")


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


def _leave_unpublished(_: Reference) -> None:
    """Send no message: the message of another task refers to the request."""


def _repeated(known: RequestStatus, reference: Reference | None = None, *, published: Any = None) -> Accepted:
    return Accepted(
        request_id=known.request_id,
        reference=reference or known.reference,
        operations=known.operations,
        refused=known.early.refused,
        new=False,
        published=published,
    )
