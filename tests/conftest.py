"""How the tests are spread over processes: `make test` runs them with `-n auto --dist loadfile`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port

HERE = Path(__file__).parent
#: Files that take half a minute and more, the longest first. A long file that starts late keeps one process busy alone.
LONGEST = (
    "acceptance/test_faults.py",
    "chaos/test_faults.py",
    "chaos/test_kills.py",
    "integration/test_transport.py",
    "acceptance/test_schemathesis.py",
    "integration/test_several_queues.py",
    "acceptance/test_main_job.py",
    "chaos/test_turns.py",
    "integration/test_remote_control.py",
    "acceptance/test_manners.py",
    "integration/test_queue.py",
    "acceptance/test_durable_aws.py",
    "acceptance/test_endings.py",
    "integration/test_fair_lanes.py",
    "integration/test_celery_shutdown.py",
    "model/test_model.py",
    "integration/test_celery_tasks.py",
    "integration/test_celery_control.py",
    "chaos/test_hostile.py",
    "acceptance/test_wheel.py",
    "acceptance/test_memory.py",
    "browser/test_flower.py",
    "acceptance/test_up.py",
    "integration/test_repeats.py",
    "integration/test_text.py",
    "chaos/test_two_workers.py",
)


def pytest_configure() -> None:
    """Hide stacks that run on this machine, those of other test processes too: commands look for one in this directory."""
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="mdstore-tests-")


def pytest_unconfigure() -> None:
    """Delete that directory."""
    shutil.rmtree(os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)


@pytest.fixture(scope="module")
def aws() -> Iterator[EmbeddedAws]:
    """Run an embedded AWS for the tests of one module."""
    with EmbeddedAws(port=free_port()) as running:
        yield running


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `-n auto`: two a core, because most of the time tests wait for a queue."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that none is left over when all others are done; the random order stays in the rest."""
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
