"""How the tests are spread over processes: `make test` runs them with `-n auto --dist loadfile`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Files that take half a minute and more, the longest first.
LONGEST = (
    "chaos/test_faults.py",
    "integration/test_transport.py",
    "acceptance/test_faults.py",
    "chaos/test_kills.py",
    "integration/test_remote_control.py",
    "integration/test_queue.py",
    "acceptance/test_wheel.py",
    "acceptance/test_examples.py",
    "compat/test_replay.py",
    "acceptance/test_main_job.py",
    "acceptance/test_inputs.py",
    "acceptance/test_memory.py",
    "acceptance/test_up.py",
    "model/test_model.py",
    "chaos/test_hostile.py",
    "browser/test_flower.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `-n auto`: two a core, because most of the time tests wait for a queue."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that none is left over when all others are done; the random order stays in the rest."""
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
