"""An app of plain tasks, as `transport_app` has them, beside those of the data store."""

from __future__ import annotations

from mdstore.tasks import create_store_app
from tests.integration.transport_app import noting_app

app = noting_app(make=create_store_app)
