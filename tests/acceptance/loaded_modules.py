"""A task that a test adds to a worker of any app (`celery worker -I tests.acceptance.loaded_modules`)."""

from __future__ import annotations

import sys

from celery import shared_task


@shared_task(name="tests.loaded_modules")
def loaded_modules() -> list[str]:
    """Return the names of the package's modules that the pool process has imported."""
    return sorted(name for name in sys.modules if name.partition(".")[0] == "mdstore")
