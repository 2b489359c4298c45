"""Small requests are accepted and applied once each while HTTP APIs and workers are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.small_requests import run


@pytest.mark.timeout(600)
def test_each_accepted_request_is_applied_once_though_processes_are_killed(tmp_path: Path) -> None:
    """Every request that got 202 ends applied, once; other content under its id is a conflict."""
    found = run(tmp_path, requests=1_000, clients=20, kills=3, pause=3.0)
    assert len(found.accepted) == 1_000
    assert found.statuses[409] > 10
