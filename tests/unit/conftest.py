"""Fixtures for the tests that make calls to a service."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest

from tests.unit.endpoint import Endpoint, FakeTime


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    thread = Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()
