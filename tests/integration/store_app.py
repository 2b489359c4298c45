"""The data store's app with the plain tasks of `transport_app` added."""

from __future__ import annotations

from mdstore.tasks import create_store_app
from tests.integration.transport_app import journaling_app

app = journaling_app(make=create_store_app)
