"""One real stack for all tests that do not stop or change it: the embedded AWS and a worker process, on free ports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mdstore.client import Client
from mdstore.local.stack import Stack


@dataclass(frozen=True)
class Ran:
    """The exit code and output of a finished command; `json` is its standard output decoded."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Ran]


def cli_of(stack: Stack) -> Cli:
    """Return a function that runs `mdstore ...` as its own process against `stack`."""

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "mdstore", *arguments],
            env=stack.environ,
            input=stdin,
            capture_output=True,
            timeout=280,
            check=False,
        )
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Yield a running stack without the HTTP API."""
    log_dir = tmp_path_factory.mktemp("stack")
    with Stack(log_dir=log_dir, with_api=False, environ={"MDSTORE_WAIT_TIME": "1"}) as running:
        yield running


@pytest.fixture(scope="session")
def cli(stack: Stack) -> Cli:
    """Return a function that runs `mdstore ...` against the shared stack."""
    return cli_of(stack)


@pytest.fixture(scope="session")
def client(stack: Stack) -> Client:
    """Return a client of the shared stack."""
    return Client(stack.settings)


@pytest.fixture
def operations_file(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes operations (mappings) or raw lines (bytes) to a file and returns the file's path."""

    def write(*lines: dict[str, Any] | bytes) -> str:
        path = tmp_path / "operations.jsonl"
        text = (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines)
        path.write_bytes(b"".join(line + b"\n" for line in text))
        return str(path)

    return write
