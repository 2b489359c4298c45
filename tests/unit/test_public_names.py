"""What the package exports is a promise."""

from __future__ import annotations

import subprocess
import sys

import mdstore


def test_the_public_names_are_these() -> None:
    """A name that is added or removed is a decision, so it is made here too."""
    assert mdstore.__all__ == [
        "Client", "ConfigurationError", "InvalidOperations", "InvalidRequest", "MdstoreError", "NotFound", "Operation",
        "Outcome", "PayloadTooLarge", "Reason", "RequestConflict", "State", "Submission", "Unavailable",
        "aget", "export", "get", "ingest", "submit", "verify",
    ]  # fmt: skip
    assert all(hasattr(mdstore, name) for name in mdstore.__all__)


def test_importing_the_package_imports_no_celery() -> None:
    """`import mdstore` and the core's store stay free of Celery and of HTTP servers."""
    code = (
        "import sys, mdstore, mdstore.store; "
        "print(sorted({'celery', 'kombu', 'fastapi', 'uvicorn'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ingest_stays_the_task_whatever_is_imported() -> None:
    """`from mdstore import ingest` is the task, also after every module of the package was imported."""
    code = "import mdstore.cli, mdstore.tasks.tasks; from mdstore import ingest; print(ingest.name, ingest.delay)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mdstore.ingest ")
