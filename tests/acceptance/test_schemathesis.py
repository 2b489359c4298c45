"""Schemathesis tries the HTTP API: it derives calls from the OpenAPI document, right ones and wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdstore.local.stack import Stack
from mdstore.store import Store

ROOT = Path(__file__).parents[2]
EXAMPLES = 8  # per operation and phase


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack whose HTTP API waits for at most a second."""
    with Stack(environ={"MDSTORE_WAIT_TIME": "1", "MDSTORE_API_MAX_WAIT": "1"}) as running:
        yield running


@pytest.mark.timeout(600)
def test_all_checks_pass(stack: Stack, tmp_path: Path) -> None:
    """None of schemathesis's checks finds anything."""
    # The shortest source allows the longest idempotency keys, and so those that the document allows.
    key = Store(stack.settings).api_keys.create(source="s", scopes=["write", "read", "operate"])
    command = [
        str(Path(sys.executable).with_name("st")),
        *("run", f"{stack.api_url}/openapi.json", "--checks", "all", "--header", f"Authorization: Bearer {key}"),
        *("--max-examples", str(EXAMPLES), "--generation-deterministic", "--seed", "1", "--workers", "1"),
        *("--max-time", "100", "--continue-on-failure", "--no-color"),
    ]
    environ = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.acceptance.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
