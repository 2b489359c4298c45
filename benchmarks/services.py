"""Starts the services that contenders call: stand-ins for DynamoDB, proxies, and the embedded AWS, one process each."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings


@contextmanager
def stub(latency_ms: float, *, upstream: int | None = None) -> Iterator[int]:
    """Run a stand-in for DynamoDB that answers after `latency_ms`; yields its port."""
    with _service("benchmarks.stub", str(latency_ms), *([str(upstream)] if upstream else [])) as port:
        yield port


@contextmanager
def proxy(upstream: int, latency_ms: float) -> Iterator[int]:
    """Run a proxy that counts calls and delays each by `latency_ms`; yields its port."""
    with _service("benchmarks.proxy", str(upstream), str(latency_ms)) as port:
        yield port


@contextmanager
def memory_aws(latency_ms: float) -> Iterator[Settings]:
    """Run a provisioned stand-in for AWS that answers after `latency_ms`; yields settings with its endpoint."""
    with _service("benchmarks.memory_aws", str(latency_ms)) as port:
        settings = load_settings({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).settings
        for _ in provision(settings):
            pass
        yield settings


@contextmanager
def _service(module: str, *arguments: str) -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", module, str(port), *arguments])  # noqa: S603  our own modules
    try:
        _wait_for(port)
        yield port
    finally:
        process.kill()
        process.wait()


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


def _wait_for(port: int, *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
