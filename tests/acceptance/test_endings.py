"""Commands end with the right exit code and message, and mask secrets."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdstore.client import Client
from mdstore.errors import InvalidRequest
from mdstore.local.emulator import free_port
from mdstore.local.stack import Stack
from tests.acceptance.conftest import Cli, Ran
from tests.waiting import until

File = Callable[..., str]
OPERATION = {"op": "upsert", "entity": "ending", "key": "k", "data": {"n": 1}}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def mdstore(*arguments: str, **environ: str) -> Ran:
    """Run `mdstore ...` with more environment variables."""
    command = [sys.executable, "-m", "mdstore", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


# -- requests without operations


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("x.jsonl", "", ()),
        ("x.jsonl", "\n\n", ()),
        ("x.jsonl", "", ("--entity", "ending", "--key", "id")),
        ("x.csv", "id,name\n", ("--entity", "ending", "--key", "id")),
    ],
)
def test_a_file_without_operations_sends_nothing(
    cli: Cli, tmp_path: Path, name: str, content: str, options: tuple[str, ...]
) -> None:
    """The file is named; no file of the command is sent, not even one that is not empty."""
    empty, good = tmp_path / name, tmp_path / "good.jsonl"
    empty.write_text(content)
    good.write_text('{"id":"k"}\n' if options else '{"op":"delete","entity":"ending","key":"k"}\n')
    ran = cli("load", str(empty), *options, "--request-id", "endings/empty")
    assert (ran.code, f"file: expected at least one operation or record, got '{empty}'" in ran.err) == (1, True), (
        ran.err
    )
    assert cli("status", "endings/empty").code == 4
    ran = cli("load", str(good), str(empty), *options, "--json")
    assert (ran.code, ran.json["error"]) == (1, "InvalidRequest")


def test_an_empty_parquet_file_sends_nothing(cli: Cli, tmp_path: Path) -> None:
    """A table without rows is refused as well."""
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": pyarrow.array([], pyarrow.string())}), path)
    ran = cli("load", str(path), "--entity", "ending", "--key", "id")
    assert (ran.code, "at least one operation" in ran.err) == (1, True)


@pytest.mark.parametrize("on_invalid", ["raise", "refuse"])
def test_a_client_refuses_a_request_without_operations(client: Client, on_invalid: Any) -> None:
    """`submit` and `ingest` raise, and store nothing."""
    request_id = f"endings/{on_invalid}"
    with pytest.raises(InvalidRequest, match="operations: expected at least one operation"):
        client.submit([], request_id=request_id, on_invalid=on_invalid)
    with pytest.raises(InvalidRequest, match="operations: expected at least one operation"):
        client.ingest.delay(iter(()), request_id=request_id, on_invalid=on_invalid)
    with pytest.raises(InvalidRequest):
        client.submit([])
    assert client.submit([OPERATION], request_id=request_id).new


# -- load


def test_a_repeated_load_does_not_say_accepted_first(cli: Cli, operations_file: File) -> None:
    """A file that was loaded before is not called accepted again."""
    path = operations_file(OPERATION)
    assert "request endings/again accepted" in cli("load", path, "--request-id", "endings/again").err
    ran = cli("load", path, "--request-id", "endings/again")
    assert "was accepted before with the same content: nothing was sent" in ran.out
    assert "again accepted" not in ran.err


@pytest.mark.parametrize("as_json", [True, False])
def test_load_says_after_an_outage_that_the_request_continues(
    operations_file: File, tmp_path: Path, as_json: bool
) -> None:
    """The message has the request's id, and the exit code is 6, as after a timeout."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"op":"delete","entity":"ending","key":"k"}\n')
    with Stack(log_dir=tmp_path, with_worker=False, with_api=False) as stack:
        files = [operations_file(OPERATION), *([str(other)] if not as_json else [])]
        more = ("--json",) if as_json else ()
        with subprocess.Popen(
            [sys.executable, "-m", "mdstore", "load", *files, *more],
            env=stack.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as load:
            queue = stack.settings.queue
            until(lambda: _waiting(Client(stack.settings), queue) == 1)
            stack.aws.stop()
            out, err = load.communicate(timeout=120)
    assert load.returncode == 6, (out, err)
    if as_json:
        said = Ran(6, out, err).json
        assert said["error"] == "Unavailable"
        assert said["new"]
        assert "the request was accepted and continues" in said["message"]
        assert re.fullmatch(r"load-[0-9a-f-]{36}", said["request_id"])
    else:
        assert "the request was accepted and continues" in err
        assert "to see its state: mdstore status load-" in err
        assert f"not sent: {other}" in err


def _waiting(client: Client, queue: str) -> int:
    sqs = client.store.aws.sqs
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])
    return int(found["Attributes"]["ApproximateNumberOfMessages"])


# -- worker and flower


@pytest.mark.parametrize("app", ["mdstore", "celery", "worker_main"])
def test_a_worker_that_fails_has_an_exit_code(stack: Stack, taken: int, app: str) -> None:
    """A worker that ends with an unrecoverable error exits with 1, however it is started."""
    code = "from workers.celery_app import app; app.worker_main(['worker', '--pool', 'solo'])"
    command = {
        "mdstore": ("-m", "mdstore", "worker"),
        "celery": ("-m", "celery", "-A", "workers.celery_app", "worker"),
        "worker_main": ("-c", code),
    }[app]
    environ = {**stack.environ, "MDSTORE_WORKER_PORT": str(taken)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Unrecoverable error" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("path", ["/livez", "/nothing"])
def test_a_workers_health_port_answers_head(stack: Stack, path: str) -> None:
    """HEAD is answered as GET without a body. The worker ends with code 0 when it is stopped."""
    port = free_port()
    environ = {**stack.environ, "MDSTORE_WORKER_PORT": str(port)}
    command = [sys.executable, "-m", "mdstore", "worker", "--quiet", "-c", "1"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as worker:
        try:
            until(lambda: _health(port, "GET", "/livez")[0] == 200, what="livez")
            get, head = _health(port, "GET", path), _health(port, "HEAD", path)
            assert (head[0], head[2]) == (get[0], b"")
            assert head[1] == get[1]
        finally:
            worker.send_signal(signal.SIGTERM)
            _, said = worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert "superuser" not in said


def _health(port: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310  our own child
            return answer.status, _without_date(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, _without_date(error.headers), error.read()
    except OSError:
        return 0, {}, b""


def _without_date(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != "Date"}


# -- up


def test_the_port_of_the_http_api_is_named(taken: int) -> None:
    """`mdstore up` with the API's port taken names the API's setting and option."""
    ran = mdstore("up", "--port", str(free_port()), "--api-port", str(taken))
    assert ran.code == 1
    assert f"setting api_port={taken}: expected a free port" in ran.err
    assert "choose another port with --api-port" in ran.err


def test_up_says_nothing_that_looks_like_a_failure(tmp_path: Path) -> None:
    """Neither Celery's warning about running as root nor any other warning is in the output of `mdstore up`."""
    command = [sys.executable, "-m", "mdstore", "up", "--port", str(free_port()), "--api-port", str(free_port())]
    with subprocess.Popen(
        command, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    ) as up:
        lines: list[str] = []
        assert up.stderr is not None
        reader = threading.Thread(target=lambda: lines.extend(up.stderr or ()))
        reader.start()
        try:
            until(lambda: any("ready" in line for line in lines))
            worker = next(re.search(r"pid (\d+)", line) for line in lines if "worker" in line)
            assert worker is not None
            children = Path(f"/proc/{worker[1]}/task/{worker[1]}/children")
            until(lambda: children.read_text().strip(), what="the worker's pool, which starts after its warnings")
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)
            reader.join(10)
    said = "".join(lines)
    assert "Warning" not in said
    assert "superuser" not in said


# -- config


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("as_json", [True, False])
def test_config_masks_the_password_of_an_endpoint(variable: str, as_json: bool) -> None:
    """The user and the host stay readable; an error about the URL masks the password too."""
    more = ("--json",) if as_json else ()
    ran = mdstore("config", *more, **{variable: "http://user:se:cr@et@127.0.0.1:9000/x", "COLUMNS": "200"})
    assert "http://user:********@127.0.0.1:9000/x" in ran.out
    assert "et@" not in ran.out
    ran = mdstore("config", *more, **{variable: "http://user:secret@127.0.0.1:99999"})
    assert ran.code == 1
    assert "secret" not in ran.out + ran.err
    assert "********@127.0.0.1:99999" in ran.out + ran.err


def test_errors_mask_the_password_of_an_endpoint() -> None:
    """An endpoint that nobody answers at is named without its password."""
    url = f"http://user:secret@127.0.0.1:{free_port()}"
    for command in (("get", "ending", "k"), ("provision",), ("status", "x")):
        ran = mdstore(*command, AWS_ENDPOINT_URL=url)
        assert ran.code == 1
        assert "secret" not in ran.out + ran.err, ran.err
