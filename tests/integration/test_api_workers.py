"""`mdstore api --workers N`: several processes serve one port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from tests.integration.api_process import ROOT, ApiProcess, api_process
from tests.waiting import until


def workers_of(pid: int) -> set[int]:
    """Return the processes that serve."""
    return {child.pid for child in psutil.Process(pid).children()}


def answers(api: ApiProcess) -> bool:
    """Return whether a call in a new connection is answered."""
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{api.port}/livez", timeout=20).status_code == 200
    return False


def serving(api: ApiProcess) -> set[int]:
    """Return the processes that have connections, while there are forty."""
    connections = [socket.create_connection(("127.0.0.1", api.port), timeout=20) for _ in range(40)]
    try:
        for connection in connections:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        for connection in connections:
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        return {
            pid
            for pid in workers_of(api.pid)
            for one in psutil.Process(pid).net_connections("tcp")
            if one.status == psutil.CONN_ESTABLISHED and one.laddr.port == api.port
        }
    finally:
        for connection in connections:
            connection.close()


def test_all_workers_serve_and_a_dead_one_is_replaced(aws: EmbeddedAws, tmp_path: Path) -> None:
    """After a SIGKILL calls go on, and soon there are as many workers as before; SIGTERM ends all."""
    with api_process(aws.url, tmp_path / "log", options=("--workers", "3")) as api:
        until(lambda: len(serving(api)) == 3)
        before = workers_of(api.pid)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: min(before) not in workers_of(api.pid))
        assert all(answers(api) for _ in range(10))
        until(lambda: len(serving(api)) == 3)
        after = workers_of(api.pid)
        assert len(after & before) == 2

        body = {"operations": [{"op": "upsert", "entity": "item", "key": "k", "data": {}}]}
        assert api.http.post("/v1/requests", json=body).status_code == 202
        os.kill(api.pid, signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid) for pid in after if psutil.pid_exists(pid)], timeout=20)
        assert not any(map(psutil.pid_exists, after))
        assert not answers(api)
        assert "ended with code -9" in api.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_code_is_that_of_a_single_process(aws: EmbeddedAws, tmp_path: Path, number: signal.Signals) -> None:
    """A call that is under way is answered first."""
    codes = []
    body = {"operations": [{"op": "upsert", "entity": "item", "key": "k", "data": {}}]}
    for workers in ("1", "2"):
        with (
            api_process(aws.url, tmp_path / workers, options=("--workers", workers)) as api,
            ThreadPoolExecutor(1) as pool,
        ):
            call = pool.submit(api.http.post, "/v1/requests?wait=2", json=body)
            time.sleep(0.5)
            os.kill(api.pid, number)
            assert call.result().status_code == 202
            codes.append(api.running.wait(20))
    assert codes[0] == codes[1]


def test_workers_end_with_a_parent_that_is_killed(aws: EmbeddedAws, tmp_path: Path) -> None:
    """The port is free afterwards."""
    with api_process(aws.url, tmp_path / "log", options=("--workers", "2")) as api:
        workers = workers_of(api.pid)
        os.kill(api.pid, signal.SIGKILL)
        until(lambda: not any(map(psutil.pid_exists, workers)), within=20)
        assert not answers(api)


def run(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mdstore", "api", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_port_that_is_taken_is_refused(aws: EmbeddedAws, tmp_path: Path) -> None:
    """Also by workers that share it, and with the exit code of a single process."""
    with api_process(aws.url, tmp_path / "log", options=("--workers", "2")) as api:
        single, several = (run("--port", str(api.port), "--workers", number) for number in ("1", "2"))
    assert single.returncode == several.returncode != 0
    assert "address already in use" in single.stderr.lower()
    assert single.stderr == several.stderr


def test_workers_that_cannot_start_end_the_command() -> None:
    """They are not started again and again."""
    done = run("--port", str(free_port()), "--workers", "2", MDSTORE_ENTITIES="no.such.module")
    assert done.returncode != 0
    assert "no.such.module" in done.stderr
