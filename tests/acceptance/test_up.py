"""`mdstore up`, and every command and code line of the README, run as a new user would run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from mdstore.local.emulator import free_port
from tests.acceptance.curl import BASH_FUNCTION
from tests.waiting import until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Up:
    """The process of a running `mdstore up`, the environment of its users, and the URL and key of its HTTP API."""

    process: subprocess.Popen[str]
    environ: dict[str, str]
    api: str
    key: str

    def sh(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run shell commands as a user of the stack."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self.environ, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def call(self, method: str, path: str, body: str = "", *, key: bool = True, request: str = "") -> tuple[int, str]:
        """Call the HTTP API, with `request` as the idempotency key if given; returns the status and the body."""
        headers = {"Content-Type": "application/json"} if body else {}
        headers |= {"Authorization": f"Bearer {self.key}"} if key else {}
        headers |= {"Idempotency-Key": request} if request else {}
        answer = httpx.request(method, f"{self.api}{path}", content=body, headers=headers, timeout=60)
        return answer.status_code, answer.text


@contextmanager
def started(port: int, api_port: int, log: Path) -> Iterator[Up]:
    """Run `mdstore up` on the given ports; yields once it is ready, and ends it with SIGINT."""
    environ = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "MDSTORE_WAIT_TIME": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            ["mdstore", "up", "--json", "--port", str(port), "--api-port", str(api_port)],
            env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        ready = json.loads(line)
        yield Up(process, {**environ, "KEY": ready["key"]}, ready["api"], ready["key"])
    finally:
        process.send_signal(signal.SIGINT)  # does nothing if the process has ended
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Yield a running `mdstore up`."""
    with started(free_port(), free_port(), tmp_path_factory.mktemp("up") / "up.log") as running:
        yield running


def block(language: str, containing: str) -> str:
    """Return the README's code block in `language` that contains a text."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(text for text in blocks if containing in text)


def test_a_request_is_posted_and_read_back(up: Up) -> None:
    """A posted request is applied and read back; repeats, conflicts and mistakes get their own answers."""
    body = '{"operations":[{"op":"insert","entity":"thing","key":"a/b","data":{"n":12345678901234567890123}}]}'

    def post(text: str, request: str = "posted-1", *, key: bool = True) -> tuple[int, str]:
        return up.call("POST", "/v1/requests?wait=20", text, key=key, request=request)

    status, answer = post(body)
    assert (status, json.loads(answer)["state"], json.loads(answer)["applied"]) == (200, "completed", 1)
    status, record = up.call("GET", "/v1/records/thing/a/b")
    assert (status, json.loads(record)["data"]) == (200, {"n": 12345678901234567890123})

    assert post(body) == (200, answer)
    assert post(body.replace("insert", "upsert"))[0] == 409
    status, answer = post(body.replace("insert", "enter"), "posted-2")
    assert status == 422
    assert json.loads(answer)["errors"] == [{"index": 0, "field": "op", "reason": "Invalid enum value 'enter'"}]
    assert post(body, key=False)[0] == 401
    assert up.call("GET", "/v1/records/thing/a/b", key=False)[0] == 401


def test_the_readmes_python_lines_do_what_their_comments_say(up: Up) -> None:
    """The README's Python block runs unchanged and prints what its comments say."""
    up.sh('mdstore load - <<< \'{"op":"delete","entity":"airport","key":"KJFK"}\'')  # another test may have inserted it
    ran = subprocess.run(
        [sys.executable, "-c", block("python", "ingest.delay")],
        env=up.environ, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    summary, data, refused = ran.stdout.strip().split("\n")
    assert "'state': 'completed'" in summary
    assert "'applied': 2, 'refused': 0" in summary
    assert data == "{'name': 'John F. Kennedy', 'elevation': 13, 'city': 'New York'}"
    assert "reason='exists'" in refused


def test_the_readmes_coroutine_runs(up: Up) -> None:
    """The block with `AsyncClient` runs unchanged on a store that has the airport of the block before it."""
    up.sh('mdstore load - <<< \'{"op":"upsert","entity":"airport","key":"KJFK","data":{}}\'')
    ran = subprocess.run(
        [sys.executable, "-c", block("python", "AsyncClient")],
        env=up.environ, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    records, outcomes = ran.stdout.strip().split("\n")
    assert "{'name': 'Berlin'}" in records
    assert "outcome='applied'" in outcomes


def test_the_readmes_commands_run(up: Up, tmp_path: Path) -> None:
    """Every `mdstore` line of the README runs unchanged; without the airports, some of the changes are refused."""
    inserted = up.sh('mdstore load - <<< \'{"op":"upsert","entity":"airport","key":"KJFK","data":{}}\'')
    assert inserted.returncode == 0, inserted.stderr
    for line in block("sh", "mdstore load").strip().split("\n"):
        ran = up.sh(line.replace("--out airports.jsonl", f"--out {tmp_path}/airports.jsonl"))
        assert ran.returncode == 0, f"{line}: {ran.stdout}{ran.stderr}"
    assert up.sh("mdstore status changes --json").stdout.count('"missing":556') == 1
    assert (tmp_path / "airports.jsonl").stat().st_size > 0


def test_the_readmes_curl_lines_run(up: Up) -> None:
    """The README's curl lines apply an operation and read it back."""
    ran = up.sh(BASH_FUNCTION + block("sh", "curl -X POST").replace("http://127.0.0.1:8080", up.api))

    assert ran.returncode == 0, ran.stderr
    assert '"state":"completed"' in ran.stdout
    assert '"data":{"name":"Berlin"}' in ran.stdout


def test_keys_are_created_and_revoked_from_the_command_line(up: Up) -> None:
    """A key printed by `mdstore key create` gives access to its own scope only; revoking it a second time exits with 4."""
    made = up.sh("mdstore key create --source erp --scope read").stdout.strip()
    other = Up(up.process, {**up.environ, "KEY": made}, up.api, made)

    assert other.call("GET", "/v1/records/thing/nothing")[0] == 404
    assert other.call("POST", "/v1/requests", "{}")[0] == 403
    assert up.sh(f"mdstore key revoke <<< {made}").returncode == 0
    assert up.sh(f"mdstore key revoke <<< {made}").returncode == 4


def test_ctrl_c_stops_every_process(tmp_path: Path) -> None:
    """After Ctrl-C the command exits with 0, none of its processes is left, and its ports are free."""
    port, api_port = free_port(), free_port()
    with started(port, api_port, tmp_path / "up.log") as running:
        # `mdstore up` does not wait for the worker, so the worker may not have its children yet.
        children = until(
            lambda: _descendants(running.process.pid, least=4), what="emulator, worker, its child, HTTP API"
        )

        running.process.send_signal(signal.SIGINT)

        assert running.process.wait(60) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []
    for number in (port, api_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", number)) != 0


def _descendants(pid: int, *, least: int) -> list[psutil.Process]:
    """Return the descendants of a process, or none while there are fewer than `least`."""
    found = psutil.Process(pid).children(recursive=True)
    return found if len(found) >= least else []


def test_a_port_in_use_is_named() -> None:
    """`mdstore up` on a port in use exits with 1; the message names the port and the option that changes it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        mdstore = shutil.which("mdstore", path=str(Path(sys.executable).parent))
        assert mdstore is not None
        ran = subprocess.run(
            [mdstore, "up", "--port", str(port)], capture_output=True, text=True, timeout=60, check=False
        )

    assert ran.returncode == 1
    assert f"setting port={port}: expected a free port on 127.0.0.1" in ran.stderr
    assert "--port" in ran.stderr
