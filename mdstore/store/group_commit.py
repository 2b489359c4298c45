"""Group commit: requests that arrive while a commit is under way form the next one, and share its payload and its message.

    GroupCommit.commit
      _take          take the waiting requests, by source
      _note          write their notes side by side, which decides about their ids
      _store         for each source: store the payload of the requests whose ids were free, and publish one message

There is no timer: a lone request is committed at once, with a payload of its own. The next commit starts when this one has
written its notes. No request fails another: each is refused, or repeats an earlier one, on its own account.

If the ids of the requests are new, there is nothing to decide, so their payload is stored while their notes are written.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mdstore.aws.concurrent import Task
from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.log import event
from mdstore.model import SCHEMA_VERSION, Reference
from mdstore.store.batch import MAX_BATCH_BYTES, MAX_BATCH_OPERATIONS, MAX_BATCH_REQUESTS, new_batch_id
from mdstore.store.ingestor import Accepted, BuiltRequest, Ingestor, Publish
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.payload import Encoded, Payloads

#: The most commits that are under way: while one sends its message, the next one writes its notes. More would be smaller.
COMMITS = 2
_IN_FLIGHT = 64  # notes that are written at the same time


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits for its commit. `accepted` gets the result or the error."""

    built: BuiltRequest
    accepted: Future[Accepted] = field(default_factory=Future)


class _Group(NamedTuple):
    """What the requests of one payload have in common."""

    source: str
    have_new_ids: bool


@dataclass(eq=False, slots=True)
class _Commit:
    """The requests of one group in one commit, and the reference that their notes have.

    A lone request has a payload of its own, and others a batch. `encoded` is the payload, as soon as it is known which of the
    requests it holds. `is_stored` is whether S3 has it.
    """

    group: _Group
    requests: list[Waiting]
    reference: Reference
    is_batch: bool
    encoded: Encoded | None = None
    is_stored: bool = False

    def close(self) -> None:
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
        self._starting = threading.Lock()
        self._under_way = 0
        self._threads = ThreadPoolExecutor(COMMITS, thread_name_prefix="mdstore-commit")

    def submit(self, built: BuiltRequest) -> Accepted:
        """Accept a request, together with those that other threads submit, as `Ingestor.accept_built` does."""
        waiting = self.add(built)
        self.start()
        return waiting.accepted.result()

    def add(self, built: BuiltRequest) -> Waiting:
        """Add a request to the next commit. The caller starts that by `start`."""
        waiting = Waiting(built)
        self._waiting.append(waiting)
        return waiting

    def start(self) -> None:
        """Start a commit on a thread, if a request waits and not too many are under way. Further ones follow by themselves."""
        with self._starting:
            if self._under_way == COMMITS or not self._waiting:
                return
            self._under_way += 1
        self._threads.submit(self._run)

    def _run(self) -> None:
        try:
            self.commit()
        finally:
            with self._starting:
                self._under_way -= 1
            self.start()

    @property
    def is_idle(self) -> bool:
        """Return whether no request waits to be taken."""
        return not self._waiting

    def commit(self) -> None:
        """Commit the waiting requests: all of them, as long as they fit into one batch for each source."""
        with ExitStack() as stack:
            with self._committing:
                taken = self._take()
                commits: list[_Commit] = []
                repeats: list[tuple[Waiting, RequestStatus]] = []
                with _failing(one for group in taken.values() for one in group):
                    for group, requests in taken.items():
                        commits.append(self._begin(group, requests))
                        stack.callback(commits[-1].close)
                    repeats = self._note(commits)
            for commit in commits:
                with _failing(commit.requests):
                    self._store(commit)
        for waiting, known in repeats:
            with _failing([waiting]):
                waiting.accepted.set_result(self._ingestor.repeat(waiting.built, known, publish=self._publish))

    def _take(self) -> dict[_Group, list[Waiting]]:
        """Take the requests of the next commit: of each group as many as a batch may have, and each id once."""
        groups: dict[_Group, list[Waiting]] = defaultdict(list)
        sizes: dict[_Group, tuple[int, int]] = defaultdict(lambda: (0, 0))
        ids: set[str] = set()
        left: list[Waiting] = []
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            built = waiting.built
            kind = _Group(built.source, built.has_new_id)
            operations, size = sizes[kind]
            operations, size = operations + built.builder.count, size + built.builder.raw
            group = groups[kind]
            is_full = len(group) == MAX_BATCH_REQUESTS or operations > MAX_BATCH_OPERATIONS or size > MAX_BATCH_BYTES
            if built.request_id in ids or (group and is_full):
                left.append(waiting)
                continue
            if waiting.accepted.set_running_or_notify_cancel():  # else its submitter has gone
                ids.add(built.request_id)
                group.append(waiting)
                sizes[kind] = operations, size
        self._waiting.extendleft(reversed(left))
        return {kind: group for kind, group in groups.items() if group}

    def _begin(self, group: _Group, requests: list[Waiting]) -> _Commit:
        batch_id = new_batch_id()
        if len(requests) == 1:
            encoded = self._ingestor.encode(requests[0].built)
        elif group.have_new_ids:
            encoded = self._encoded(group, batch_id, requests)
        else:  # the notes decide which requests the batch has, so its digest is not known yet
            key, source = self._payloads.key(batch_id), group.source
            noted = Reference(v=SCHEMA_VERSION, request_id=batch_id, payload=key, digest="", lanes=1, source=source)
            return _Commit(group, requests, noted, is_batch=True)
        return _Commit(group, requests, self._payloads.reference(encoded), len(requests) > 1, encoded)

    def _encoded(self, group: _Group, batch_id: str, requests: Sequence[Waiting]) -> Encoded:
        pairs = [(waiting.built.request_id, waiting.built.builder) for waiting in requests]
        return self._ingestor.encode_batch(batch_id, group.source, pairs)

    def _note(self, commits: Sequence[_Commit]) -> list[tuple[Waiting, RequestStatus]]:
        """Write the notes of all requests, and keep only those in the commits whose ids were free; return the others.

        Store the payloads of new ids at the same time.
        """
        pairs = [(commit, waiting) for commit in commits for waiting in commit.requests]
        early = [(commit, commit.encoded) for commit in commits if commit.encoded and commit.group.have_new_ids]
        tasks: list[Task[Any]] = [self._payloads.put_task(encoded) for _, encoded in early]
        tasks += [self._ingestor.note_task(waiting.built, commit.reference) for commit, waiting in pairs]
        for commit in commits:
            commit.requests = []
        outcomes = self._ledger.outcomes(tasks, in_flight=_IN_FLIGHT)
        for (commit, _), outcome in zip(early, outcomes[: len(early)], strict=True):
            commit.is_stored = outcome is True  # if it is not, the next attempt finds out why
        repeats: list[tuple[Waiting, RequestStatus]] = []
        for (commit, waiting), outcome in zip(pairs, outcomes[len(early) :], strict=True):
            if isinstance(outcome, Exception):
                waiting.accepted.set_exception(outcome)
            elif outcome is not None and not waiting.built.has_new_id:
                repeats.append((waiting, outcome))
            else:
                commit.requests.append(waiting)
        return repeats

    def _store(self, commit: _Commit) -> None:
        """Store the payload of a commit and publish its message, and resolve its requests."""
        if not commit.requests:
            return
        if not commit.is_batch:
            self._finish_lone(commit)
            return
        if not commit.is_stored and not self._store_batch(commit):
            # Another process has given up on this one, and keeps the batch from being stored.
            self._accept_one_by_one(commit)
            return
        published = self._publish(commit.reference)
        for waiting in commit.requests:
            builder = waiting.built.builder
            event("request.accepted", request_id=waiting.built.request_id, operations=builder.count, lanes=1)
            waiting.accepted.set_result(
                Accepted(
                    request_id=waiting.built.request_id,
                    reference=commit.reference,
                    operations=builder.count,
                    refused=builder.refused_counts,
                    new=True,
                    published=published,
                )
            )
        if commit.group.have_new_ids:  # nobody can repeat requests whose ids are new
            return
        try:  # the requests are accepted whether this succeeds or not
            self._ledger.record_sent(commit.reference.request_id)
        except (Unavailable, DeploymentBroken) as error:
            event("batch.unnoted", level=logging.WARNING, batch_id=commit.reference.request_id, error=str(error))

    def _finish_lone(self, commit: _Commit) -> None:
        (waiting,), encoded = commit.requests, commit.encoded
        if encoded is None:
            raise ValueError("a lone request has no payload")
        accepted = self._ingestor.finish(waiting.built, encoded, publish=self._publish, is_stored=commit.is_stored)
        waiting.accepted.set_result(accepted)

    def _store_batch(self, commit: _Commit) -> bool:
        """Store a batch, and return whether S3 has it. If not, an empty batch has taken its place."""
        if commit.encoded is None:
            commit.encoded = self._encoded(commit.group, commit.reference.request_id, commit.requests)
            commit.reference = self._payloads.reference(commit.encoded)
        return self._payloads.put_batch(commit.encoded)

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
