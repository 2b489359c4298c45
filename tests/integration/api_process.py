"""Runs the HTTP API as a process of its own, and measures it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import psutil

from mdstore.client import Client
from mdstore.local.emulator import free_port
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.processes import peak_memory
from tests.waiting import until

ROOT = Path(__file__).parents[2]
LIMITED = "mdstore.api.connections:LimitedConnection"


@dataclass(frozen=True, kw_only=True)
class ApiProcess:
    """A running HTTP API, and a client of it that has the key of the source `erp`."""

    running: subprocess.Popen[bytes]
    http: httpx.Client
    client: Client
    log: Path
    environ: Mapping[str, str]

    @property
    def pid(self) -> int:
        """The process id."""
        return self.running.pid

    @property
    def port(self) -> int:
        """The port on 127.0.0.1."""
        return int(self.http.base_url.port or 0)

    def key(self, *scopes: str, source: str) -> dict[str, str]:
        """Return the header of a new key."""
        return {"Authorization": f"Bearer {self.client.store.api_keys.create(source=source, scopes=scopes)}"}

    def peak(self) -> int:
        """Return the most bytes of memory that the process has had so far."""
        return peak_memory(self.pid)

    def processor_seconds(self) -> float:
        """Return the processor time that the process has used so far."""
        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)


@contextmanager
def process(
    *command: str, environ: Mapping[str, str], log: Path, files: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module with arguments, and stop it at the end. `files` is the most descriptors that the process may have."""

    def limit_files() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=dict(environ),
            stdout=output,
            stderr=output,
            preexec_fn=limit_files,  # noqa: PLW1509  this process has no other thread that could hold a lock
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@contextmanager
def served(
    environ: Mapping[str, str],
    log: Path,
    *,
    files: int | None = None,
    with_uvicorn: bool = False,
    options: Sequence[str] = (),
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Serve the HTTP API with `mdstore api` or uvicorn's command; yields its process and a client without a key."""
    port = free_port()
    command = ["mdstore", "api", "--port", str(port), *options]
    if with_uvicorn:
        command = ["uvicorn", "--factory", "mdstore.api:create_api", "--port", str(port), "--http", LIMITED, *options]
    with (
        process(*command, environ=environ, log=log, files=files) as running,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as http,
    ):

        def serves() -> bool:
            assert running.poll() is None, log.read_text()
            try:
                return http.get("/livez").status_code == 200
            except httpx.TransportError:
                return False

        until(serves)
        yield running, http


@contextmanager
def api_process(
    endpoint: str,
    log: Path,
    *,
    files: int | None = None,
    with_uvicorn: bool = False,
    options: Sequence[str] = (),
    **settings: object,
) -> Iterator[ApiProcess]:
    """Provision a namespace, and serve the HTTP API on it."""
    environ = {
        **os.environ,
        "MDSTORE_PROFILE": "local",
        "MDSTORE_NAMESPACE": f"api-{uuid4().hex[:12]}",
        "AWS_ENDPOINT_URL": endpoint,
        **{f"MDSTORE_{name.upper()}": str(value) for name, value in settings.items()},
    }
    client = Client(load_settings(environ).settings)
    list(provision(client.settings))
    with served(environ, log, files=files, with_uvicorn=with_uvicorn, options=options) as (running, http):
        found = ApiProcess(running=running, http=http, client=client, log=log, environ=environ)
        http.headers.update(found.key("write", "read", source="erp"))
        yield found
