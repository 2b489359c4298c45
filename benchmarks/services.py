"""Starts the services that contenders call: stand-ins for AWS, proxies, the embedded AWS, and servers, one process each."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import kill_group
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings


class Server(NamedTuple):
    """A running server: its port on 127.0.0.1, and its process id."""

    port: int
    pid: int


@contextmanager
def stub(latency_ms: float, *, upstream: int | None = None) -> Iterator[int]:
    """Run a stand-in for DynamoDB that answers after `latency_ms`; yields its port."""
    with server("benchmarks.stub", str(latency_ms), *([str(upstream)] if upstream else [])) as found:
        yield found.port


@contextmanager
def proxy(upstream: int, latency_ms: float) -> Iterator[int]:
    """Run a proxy that counts calls and delays each by `latency_ms`; yields its port."""
    with server("benchmarks.proxy", str(upstream), str(latency_ms)) as found:
        yield found.port


@contextmanager
def memory_aws(latency_ms: float) -> Iterator[Settings]:
    """Run a provisioned stand-in for AWS that answers after `latency_ms`; yields settings with its endpoint."""
    with server("benchmarks.memory_aws", str(latency_ms)) as found:
        settings = load_settings({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}"}).settings
        for _ in provision(settings):
            pass
        yield settings


@contextmanager
def http_api() -> Iterator[Server]:
    """Run `mdstore api`, which finds its AWS in the environment; yields it once it serves."""
    port = free_port()
    with _process(port, "mdstore", "api", "--port", str(port)) as found:
        yield found


@contextmanager
def server(module: str, *arguments: str) -> Iterator[Server]:
    """Run a module of ours that serves the port in its first argument; yields it once it serves."""
    port = free_port()
    with _process(port, module, str(port), *arguments) as found:
        yield found


@contextmanager
def _process(port: int, *command: str) -> Iterator[Server]:
    process = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)  # noqa: S603  our own modules
    try:
        _wait_for(port, process)
        yield Server(port, process.pid)
    finally:
        kill_group(process)


@contextmanager
def embedded_aws(module: str = "ministack") -> Iterator[Settings]:
    """Run a provisioned ministack from `module`; yields settings with its endpoint."""
    with EmbeddedAws(port=free_port(), module=module) as aws:
        settings = load_settings({"AWS_ENDPOINT_URL": aws.url}).settings
        for _ in provision(settings):
            pass
        yield settings


def environ_of(settings: Settings) -> dict[str, str]:
    """Return the environment variables that lead a child process to the same services, whichever library it uses."""
    return {
        "MDSTORE_PROFILE": "local",
        "AWS_ENDPOINT_URL": str(settings.endpoint_url),
        "AWS_REGION": settings.region,
        "AWS_DEFAULT_REGION": settings.region,
        "AWS_ACCESS_KEY_ID": str(settings.aws_access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(settings.aws_secret_access_key),
    }


def _wait_for(port: int, process: subprocess.Popen[bytes], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
