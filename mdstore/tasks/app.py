"""The data store's Celery app: an app of `mdstore.queue` with a store and the three tasks."""

from __future__ import annotations

from typing import Any

from mdstore.queue.app import SqsApp, configure
from mdstore.settings import Settings
from mdstore.store import Store
from mdstore.tasks.tasks import register


class StoreApp(SqsApp):
    """An app whose tasks share the process's `Store`."""

    _store: Store | None = None

    @property
    def store(self) -> Store:
        """The store of this process, over its clients."""
        aws = self.aws
        store = self._store
        if store is None or store.aws is not aws:
            with self._lock:
                store = self._store
                if store is None or store.aws is not aws:
                    store = self._store = Store(self.settings, aws=aws)
        return store

    def warm_up(self) -> None:
        """Build the store too."""
        super().warm_up()
        _ = self.store


def create_store_app(
    settings: Settings | None = None, *, name: str = "mdstore", event_queue: str | None = None, **conf: Any
) -> StoreApp:
    """Make the data store's app: what `mdstore.queue.create_app` makes, with the tasks `mdstore.ingest` and its helpers."""
    app = configure(StoreApp(name, set_as_current=False), settings, event_queue=event_queue, **conf)
    register(app)
    return app
