"""The names that the package exports are a promise."""

from __future__ import annotations

import subprocess
import sys

import mdstore


def test_the_public_names() -> None:
    """Adding or removing a name is a decision, so it must be made here too."""
    assert mdstore.__all__ == [
        "AsyncClient", "AsyncSubmission", "Client", "ConfigurationError", "InvalidOperations", "InvalidRequest",
        "MdstoreError", "NotFound", "Operation", "Outcome", "PayloadTooLarge", "Reason", "RequestConflict", "State",
        "Submission", "Unavailable", "aget", "export", "get", "ingest", "submit", "verify",
    ]  # fmt: skip
    assert all(hasattr(mdstore, name) for name in mdstore.__all__)


def test_importing_the_package_imports_no_celery() -> None:
    """Importing `mdstore` or `mdstore.store` imports neither Celery nor an HTTP server."""
    code = (
        "import sys, mdstore, mdstore.store; "
        "print(sorted({'celery', 'kombu', 'fastapi', 'uvicorn'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ingest_is_the_task_whatever_was_imported() -> None:
    """`from mdstore import ingest` is the task even after every module of the package was imported."""
    code = "import mdstore.cli, mdstore.tasks.tasks; from mdstore import ingest; print(ingest.name, ingest.delay)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mdstore.ingest ")
