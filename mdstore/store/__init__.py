"""The data store, without Celery: operations, payloads, the ingestor, the writer, the ledger and records."""

from mdstore.store.store import Store

__all__ = ["Store"]
