"""The data store's Celery tasks, and the app that registers them."""

from mdstore.tasks.app import StoreApp, create_store_app

__all__ = ["StoreApp", "create_store_app"]
