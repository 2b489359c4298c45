"""Group commit: requests that arrive while a commit is under way form the next one, and share its payload and its message.

    GroupCommit.commit
      _take          take the waiting requests, by source
      _note          write their notes side by side, which decides about their ids
      _store         for each source: store the payload of the requests whose ids were free, and publish one message

There is no timer: a lone request is committed at once, with a payload of its own. The next commit starts when this one has
written its notes. No request fails another: each is refused, or repeats an earlier one, on its own account.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.log import event
from mdstore.model import SCHEMA_VERSION, Reference
from mdstore.store.batch import MAX_BATCH_BYTES, MAX_BATCH_OPERATIONS, MAX_BATCH_REQUESTS, new_batch_id
from mdstore.store.ingestor import Accepted, BuiltRequest, Ingestor, Publish
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.payload import Encoded, Payloads

_IN_FLIGHT = 64  # notes that are written at the same time


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits for its commit. `accepted` gets the result or the error."""

    built: BuiltRequest
    accepted: Future[Accepted] = field(default_factory=Future)
    is_taken: bool = False


@dataclass(eq=False, slots=True)
class _Commit:
    """The requests of one source in one commit. `encoded` is the payload of a lone one; several have a batch, encoded later."""

    source: str
    requests: list[Waiting]
    reference: Reference
    encoded: Encoded | None = None

    def __enter__(self) -> None:
        """Use the commit."""

    def __exit__(self, *_: object) -> None:
        """Discard the payload."""
        if self.encoded is not None:
            self.encoded.body.close()


class GroupCommit:
    """Commits small requests in groups. Threads share it; a forked child must make its own."""

    def __init__(
        self,
        *,
        ingestor: Ingestor,
        payloads: Payloads,
        ledger: Ledger,
        publish: Publish,
    ) -> None:
        self._ingestor = ingestor
        self._payloads = payloads
        self._ledger = ledger
        self._publish = publish
        self._waiting: deque[Waiting] = deque()
        self._committing = threading.Lock()  # held from taking the requests until their notes are written

    def submit(self, built: BuiltRequest) -> Accepted:
        """Accept a request, together with those that other threads submit, as `Ingestor.accept_built` does."""
        waiting = self.add(built)
        while not waiting.is_taken:
            self.commit(waiting)
        return waiting.accepted.result()

    def add(self, built: BuiltRequest) -> Waiting:
        """Add a request to the next commit. Whoever adds requests must see to it that `commit` is called."""
        waiting = Waiting(built)
        self._waiting.append(waiting)
        return waiting

    @property
    def is_idle(self) -> bool:
        """Return whether no request waits to be taken."""
        return not self._waiting

    def commit(self, unless_taken: Waiting | None = None) -> None:
        """Commit the waiting requests: all of them, as long as they fit into one batch for each source.

        Do nothing if the request `unless_taken` has been taken by another thread's commit when it is this thread's turn.
        """
        with self._committing:
            if unless_taken is not None and unless_taken.is_taken:
                return
            taken = self._take()
            commits: list[_Commit] = []
            repeats: list[tuple[Waiting, RequestStatus]] = []
            with _failing(one for group in taken.values() for one in group):
                commits = [self._begin(source, group) for source, group in taken.items()]
                repeats = self._note(commits)
        for commit in commits:
            with _failing(commit.requests), commit:
                self._store(commit)
        for waiting, known in repeats:
            with _failing([waiting]):
                waiting.accepted.set_result(self._ingestor.repeat(waiting.built, known, publish=self._publish))

    def _take(self) -> dict[str, list[Waiting]]:
        """Take the requests of the next commit: for each source, as many as a batch may have, and each id once."""
        groups: dict[str, list[Waiting]] = defaultdict(list)
        sizes: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        ids: set[str] = set()
        left: list[Waiting] = []
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            built = waiting.built
            operations, size = sizes[built.source]
            operations, size = operations + built.builder.count, size + built.builder.raw
            group = groups[built.source]
            is_full = len(group) == MAX_BATCH_REQUESTS or operations > MAX_BATCH_OPERATIONS or size > MAX_BATCH_BYTES
            if built.request_id in ids or (group and is_full):
                left.append(waiting)
                continue
            waiting.is_taken = True
            if waiting.accepted.set_running_or_notify_cancel():  # else its submitter has gone
                ids.add(built.request_id)
                group.append(waiting)
                sizes[built.source] = operations, size
        self._waiting.extendleft(reversed(left))
        return {source: group for source, group in groups.items() if group}

    def _begin(self, source: str, group: list[Waiting]) -> _Commit:
        if len(group) == 1:
            encoded = self._ingestor.encode(group[0].built)
            return _Commit(source, group, self._payloads.reference(encoded), encoded)
        batch_id = new_batch_id()
        key = self._payloads.key(batch_id)
        # The digest is not known before the notes have decided which requests the batch has.
        reference = Reference(v=SCHEMA_VERSION, request_id=batch_id, payload=key, digest="", lanes=1, source=source)
        return _Commit(source, group, reference)

    def _note(self, commits: Sequence[_Commit]) -> list[tuple[Waiting, RequestStatus]]:
        """Write the notes of all requests, and keep only those in the commits whose ids were free; return the others."""
        pairs = [(commit, waiting) for commit in commits for waiting in commit.requests]
        tasks = [self._ingestor.note_task(waiting.built, commit.reference) for commit, waiting in pairs]
        repeats: list[tuple[Waiting, RequestStatus]] = []
        for commit in commits:
            commit.requests = []
        for (commit, waiting), outcome in zip(pairs, self._ledger.outcomes(tasks, in_flight=_IN_FLIGHT), strict=True):
            if isinstance(outcome, Exception):
                waiting.accepted.set_exception(outcome)
            elif outcome is not None:
                repeats.append((waiting, outcome))
            else:
                commit.requests.append(waiting)
        return repeats

    def _store(self, commit: _Commit) -> None:
        """Store the payload of a commit and publish its message, and resolve its requests."""
        if not commit.requests:
            return
        if commit.encoded is not None:
            (waiting,) = commit.requests
            waiting.accepted.set_result(self._ingestor.finish(waiting.built, commit.encoded, publish=self._publish))
            return
        reference = self._store_batch(commit)
        if reference is None:  # another process has given up on this one, and keeps the batch from being stored
            self._accept_one_by_one(commit)
            return
        published = self._publish(reference)
        for waiting in commit.requests:
            builder = waiting.built.builder
            event("request.accepted", request_id=waiting.built.request_id, operations=builder.count, lanes=1)
            waiting.accepted.set_result(
                Accepted(
                    request_id=waiting.built.request_id,
                    reference=reference,
                    operations=builder.count,
                    refused=builder.refused_counts,
                    new=True,
                    published=published,
                )
            )
        try:  # the requests are accepted whether this succeeds or not
            self._ledger.record_sent(reference.request_id)
        except (Unavailable, DeploymentBroken) as error:
            event("batch.unnoted", level=logging.WARNING, batch_id=reference.request_id, error=str(error))

    def _store_batch(self, commit: _Commit) -> Reference | None:
        """Store a batch, and return its reference. Return None if an empty batch has taken its place."""
        requests = [(waiting.built.request_id, waiting.built.builder) for waiting in commit.requests]
        encoded = self._ingestor.encode_batch(commit.reference.request_id, commit.source, requests)
        with closing(encoded.body):
            return self._payloads.reference(encoded) if self._payloads.put_batch(encoded) else None

    def _accept_one_by_one(self, commit: _Commit) -> None:
        for waiting in commit.requests:
            with _failing([waiting]):
                accepted = self._ingestor.accept_built(
                    waiting.built, publish=self._publish, replaces=commit.reference.request_id
                )
                waiting.accepted.set_result(accepted)


@contextmanager
def _failing(requests: Iterable[Waiting]) -> Iterator[None]:
    """Give an error to those of the requests that have no result yet: their submitters raise it."""
    requests = list(requests)
    try:
        yield
    except BaseException as error:
        for waiting in requests:
            if not waiting.accepted.done():
                waiting.accepted.set_exception(error)
        if not isinstance(error, Exception):
            raise
