"""The data store's Celery app: an `mdstore.queue` app with a store and three tasks."""

from __future__ import annotations

from typing import Any

from mdstore.queue.app import SqsApp
from mdstore.settings import Settings
from mdstore.store import Store
from mdstore.tasks.tasks import register


class StoreApp(SqsApp):
    """An app whose tasks share one `Store` per process."""

    has_store = True
    _store: Store | None = None

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

    def warm_up(self) -> None:
        """Build the clients and the store before the first message."""
        super().warm_up()
        _ = self.store


def create_store_app(
    settings: Settings | None = None, *, name: str = "mdstore", event_queue: str | None = None, **options: Any
) -> StoreApp:
    """Create the data store's app: an app like that of `mdstore.queue.create_app`, with the data store's tasks."""
    return StoreApp(name, settings=settings, event_queue=event_queue, **options)
