"""The manners of the command line, from outside: what it says, and which code it ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from mdstore import exactjson
from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import Stack
from tests.acceptance.conftest import Cli, Ran, cli_of

File = Callable[..., str]
ISO_8601 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
OPERATION = {"op": "insert", "entity": "manners", "key": "k", "data": {"n": 1}}


@pytest.fixture(scope="module")
def idle() -> Iterator[Stack]:
    """A stack with an HTTP API and without a worker."""
    with Stack(with_worker=False, environ={"MDSTORE_WAIT_TIME": "1"}) as running:
        yield running


def without_endpoint(directory: Path, **more: str) -> dict[str, str]:
    """An environment that names no endpoint, and in which announcements are in `directory`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MDSTORE_"))}
    return {**kept, "XDG_RUNTIME_DIR": str(directory), **more}


def run(*arguments: str, environ: dict[str, str]) -> Ran:
    """Run `mdstore ...` in an environment of its own."""
    command = [sys.executable, "-m", "mdstore", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_load_that_nobody_works_on(idle: Stack, operations_file: File) -> None:
    """Without a worker, `load` says so after some seconds, and ends with code 6 at its timeout: the request is durable."""
    path = operations_file(OPERATION)
    ran = cli_of(idle)("load", path, "--request-id", "idle/1", "--timeout", "12")
    assert ran.code == 6
    assert "no worker has started the request within 10 s" in ran.err
    assert "the request is not finished, and continues: mdstore status idle/1 --watch" in ran.err
    ran = cli_of(idle)("load", path, "--request-id", "idle/1", "--timeout", "1", "--json")
    assert (ran.code, ran.json["state"], ran.json["new"]) == (6, "accepted", False)
    assert cli_of(idle)("load", path, "--request-id", "idle/1", "--no-wait").code == 0


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
def test_a_body_may_begin_with_a_byte_order_mark(idle: Stack, media_type: str) -> None:
    """The bytes that `load` takes are taken by the HTTP API as well."""
    line = json.dumps(OPERATION)
    body = line if "ndjson" in media_type else f'{{"operations":[{line}]}}'
    headers = {"Authorization": f"Bearer {idle.api_key}", "Content-Type": media_type}
    answer = httpx.post(f"{idle.api_url}/v1/requests", content=b"\xef\xbb\xbf" + body.encode(), headers=headers)
    assert answer.status_code == 202, answer.text


def test_times_are_iso_8601(cli: Cli, operations_file: File) -> None:
    """`--json` writes times as the HTTP API does."""
    assert cli("load", operations_file(OPERATION), "--request-id", "manners/1").code == 0
    state = cli("status", "manners/1", "--json").json
    assert all(ISO_8601.fullmatch(state[name]) for name in ("accepted_at", "started_at", "finished_at"))
    assert ISO_8601.fullmatch(cli("get", "manners", "k", "--json").json["updated_at"])


def test_watching_ends_at_one_hundred_percent(cli: Cli, operations_file: File) -> None:
    """The last picture of the bar shows all operations."""
    cli("load", operations_file({**OPERATION, "key": "watched"}), "--request-id", "manners/2")
    ran = cli("status", "manners/2", "--watch")
    assert (ran.code, "1/1 100%" in ran.err) == (0, True), ran.err


def test_a_reader_that_has_seen_enough_is_no_error(cli: Cli, stack: Stack, operations_file: File) -> None:
    """`mdstore export | head` ends with code 0 and without a message."""
    cli("load", operations_file({**OPERATION, "op": "upsert", "key": "piped"}))
    command = f"{sys.executable} -m mdstore export | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=stack.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_data_has_a_way_to_json(cli: Cli, client: Client, operations_file: File) -> None:
    """`exactjson.dumps` writes a record's data with all its digits, as the README says."""
    line = b'{"op":"upsert","entity":"manners","key":"exact","data":{"n":1.2345678901234567890123}}'
    assert cli("load", operations_file(line)).code == 0
    data = client.get("manners", "exact").data
    assert data == {"n": Decimal("1.2345678901234567890123")}
    assert exactjson.dumps(data) == b'{"n":1.2345678901234567890123}'


def test_what_is_missing_is_named_with_the_command() -> None:
    """On a machine where nothing was provisioned, the error names bucket, queue and tables, also with `--json`."""
    with EmbeddedAws(port=free_port()) as aws:
        environ = without_endpoint(Path("/nonexistent"), AWS_ENDPOINT_URL=aws.url)
        ran = run("get", "airport", "KJFK", environ=environ)
        assert ran.code == 1
        assert "table mdstore-records, table mdstore-ledger" in ran.err
        assert "`mdstore provision` creates what is missing" in ran.err
        ran = run("status", "nobody", "--json", environ=environ)
        assert (ran.code, "Missing: bucket mdstore-payloads, queue mdstore" in ran.json["message"]) == (1, True)


def test_commands_find_a_running_stack(tmp_path: Path) -> None:
    """`up --port N` names the endpoint for other shells; commands of the same user find it, until it stops."""
    port = free_port()
    environ = without_endpoint(tmp_path)
    command = [sys.executable, "-m", "mdstore", "up", "--port", str(port), "--api-port", str(free_port())]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as up:
        try:
            assert up.stderr is not None
            said = ""
            while "ready" not in said:
                line = up.stderr.readline()
                assert line, said
                said += line
            assert f"export AWS_ENDPOINT_URL=http://127.0.0.1:{port}" in said
            assert run("get", "airport", "none", environ=environ).code == 4
            rows = {row["name"]: row for row in run("config", "--json", environ=environ).json}
            assert rows["endpoint_url"]["value"] == f"http://127.0.0.1:{port}"
            assert rows["endpoint_url"]["origin"] == "mdstore up"
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)
    rows = {row["name"]: row for row in run("config", "--json", environ=environ).json}
    assert rows["endpoint_url"]["origin"] == "profile local"


@pytest.mark.parametrize("url", ["foo", "http://127.0.0.1:99999", "http://", "ftp://x", "http://[::1", "http://x:y"])
@pytest.mark.parametrize("command", [("get", "airport", "KJFK"), ("provision",)])
def test_a_wrong_url_is_a_message(tmp_path: Path, url: str, command: tuple[str, ...]) -> None:
    """The setting, its value and an example are named, and there is no traceback."""
    ran = run(*command, environ=without_endpoint(tmp_path, AWS_ENDPOINT_URL=url))
    assert ran.code == 1
    assert f"setting endpoint_url='{url}': expected a URL such as http://127.0.0.1:4566" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("command", [("up", "--port"), ("up", "--api-port"), ("api", "--port")])
def test_a_wrong_port_is_a_message(tmp_path: Path, command: tuple[str, ...]) -> None:
    """A port over 65535 is a usage error."""
    ran = run(*command, "99999", environ=without_endpoint(tmp_path))
    assert (ran.code, "99999 is not in the range" in ran.err) == (2, True)


def test_dir_shows_the_public_names() -> None:
    """An interactive user sees the names that are made on first use."""
    code = "import mdstore; print(set(mdstore.__all__) - set(dir(mdstore)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
