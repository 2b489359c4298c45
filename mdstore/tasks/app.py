"""The data store's Celery app: an `mdstore.queue` app with a store and three tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdstore.queue.app import SqsApp
from mdstore.queue.broker.canvas import signatures
from mdstore.queue.broker.envelope import Malformed
from mdstore.settings import Settings
from mdstore.store import Store
from mdstore.store.batch import MAX_OPERATIONS
from mdstore.store.group_commit import GroupCommit
from mdstore.tasks.follow_ups import by_reference, is_by_reference
from mdstore.tasks.ingest import OPERATIONS
from mdstore.tasks.tasks import STORE_TASKS, register


class StoreApp(SqsApp):
    """An app whose tasks share one `Store` per process."""

    has_store = True
    _store: Store | None = None
    _group_commit: tuple[Store, GroupCommit] | None = None

    def __init__(self, main: str | None = None, **options: Any) -> None:
        super().__init__(main, **options)
        register(self)

    @property
    def store(self) -> Store:
        """This process's store, built on this process's AWS clients."""
        aws = self.aws
        store = self._store
        if store is None or store.aws is not aws:
            with self._lock:
                store = self._store
                if store is None or store.aws is not aws:
                    store = self._store = Store(self.settings, aws=aws)
        return store

    def adopt(self, store: Store) -> None:
        """Use a store that this process already has, and its clients."""
        self._aws, self._store = store.aws, store

    @property
    def group_commit(self) -> GroupCommit:
        """This process's group commit, which publishes what it commits as messages of the task `mdstore.ingest`."""
        store = self.store
        found = self._group_commit
        if found is None or found[0] is not store:
            with self._lock:
                found = self._group_commit
                if found is None or found[0] is not store:
                    publish = self.tasks[STORE_TASKS[0]].publish
                    commit = GroupCommit(
                        ingestor=store.ingestor, payloads=store.payloads, ledger=store.ledger, publish=publish
                    )
                    found = self._group_commit = store, commit
        return found[1]

    def admit(self, task: str, canvas: Any) -> None:
        """Refuse Celery's built-in tasks, and follow-ups that would reach the store's tasks with more than a reference.

        Anyone who may send to the queue may write such a message, and a worker would execute it with its own rights.
        """
        super().admit(task, canvas)
        if task.startswith("celery."):
            raise Malformed(f"Celery's built-in task {task!r} is disabled where the data store's tasks run")
        for signature in signatures(canvas):
            if signature["task"] in STORE_TASKS and not is_by_reference(signature):
                raise Malformed(f"a follow-up to {signature['task']!r} must name an accepted request by its reference")

    def is_small(self, headers: Mapping[str, Any]) -> bool:
        """Return whether a message says that its request is small, and is delivered for the first time.

        A message that was delivered before runs alone: it may be the one that killed the process it shared with others.
        """
        operations = headers.get(OPERATIONS)
        return (
            headers["task"] == STORE_TASKS[0]
            and type(operations) is int
            and 0 < operations <= MAX_OPERATIONS
            and headers.get("receives") == 1 < self.settings.max_receives
            and not headers.get("group")
        )

    def prepare_canvas(self, canvas: Any) -> Any:
        """Accept the requests in a canvas, and return it with references to them in place of their operations."""
        return by_reference(canvas, self.tasks[STORE_TASKS[0]])

    def warm_up(self) -> None:
        """Build the clients and the store before the first message."""
        super().warm_up()
        _ = self.store


def create_store_app(
    settings: Settings | None = None,
    *,
    name: str = "mdstore",
    event_queue: str | None = None,
    store: Store | None = None,
    **options: Any,
) -> StoreApp:
    """Create the data store's app: an app like that of `mdstore.queue.create_app`, with the data store's tasks.

    Its tasks use `store`, if this process already has one with the same settings.
    """
    app = StoreApp(name, settings=settings, event_queue=event_queue, **options)
    if store is not None:
        app.adopt(store)
    return app
