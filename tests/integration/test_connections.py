"""Connections of callers without a key end neither the service nor its log."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from mdstore.local.emulator import EmbeddedAws
from tests.integration.api_process import ApiProcess, api_process
from tests.waiting import until

HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/requests HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"


@pytest.fixture(scope="module")
def api(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """Yield an API with short times, under the usual limit of 1,024 files."""
    times: dict[str, Any] = {"api_head_timeout": 2, "api_body_timeout": 2, "api_write_timeout": 2}
    with api_process(aws.url, tmp_path_factory.mktemp("api") / "log", files=1_024, **times) as running:
        yield running


def connected(api: ApiProcess, send: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", api.port), timeout=20)
    made.sendall(send)
    return made


def closed_after(connection: socket.socket) -> float:
    """Wait until the API closes a connection; returns the seconds that took."""
    began = time.monotonic()
    with connection:
        try:
            while connection.recv(2**16):
                pass
        except ConnectionResetError:
            pass
    return time.monotonic() - began


def takes(connection: socket.socket, data: bytes) -> bool:
    """Return whether the other side still takes data."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("send", [b"", HEAD], ids=["nothing", "partial headers"])
def test_silent_connections_do_not_end_the_service(api: ApiProcess, send: bytes) -> None:
    """With 1,100 of them it answers as before, in a new connection and soon, uses little time, and logs little."""
    logged, used = api.log.stat().st_size, api.processor_seconds()
    with ExitStack() as stack:
        for _ in range(1_100):
            stack.enter_context(connected(api, send))
        for _ in range(5):
            began = time.monotonic()
            assert httpx.get(f"http://127.0.0.1:{api.port}/livez", timeout=20).status_code == 200
            assert httpx.get(f"http://127.0.0.1:{api.port}/readyz", timeout=20).status_code == 200
            assert time.monotonic() - began < 15
        time.sleep(1)
    assert api.processor_seconds() - used < 10
    assert api.log.stat().st_size - logged < 10_000


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_one_connection_too_many_closes_the_one_idle_for_the_longest(aws: EmbeddedAws, tmp_path: Path) -> None:
    """It makes room at once, for any number of new ones; if all have a request, the new one is answered with 503."""
    with api_process(aws.url, tmp_path / "log", api_max_connections=4) as api, ExitStack() as stack:
        api.http.close()  # it keeps a connection too
        silent = [stack.enter_context(connected(api)) for _ in range(20)]
        until(lambda: sum(map(is_open, silent)) == 4, within=5)
        assert all(map(is_open, silent[-4:]))
        assert httpx.get(f"http://127.0.0.1:{api.port}/livez", timeout=20).status_code == 200

        body = f"Authorization: {api.http.headers['authorization']}\r\nContent-Length: 1000\r\n\r\n{{".encode()
        for _ in range(4):
            stack.enter_context(connected(api, POST + body))
        time.sleep(1)
        refused = connected(api)
        refused.settimeout(20)
        with refused, refused.makefile("rb") as answer:
            head, _, problem = answer.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in head
        assert json.loads(problem)["status"] == 503


def test_a_connection_that_sends_no_request_is_closed(api: ApiProcess) -> None:
    """So is one whose headers never end, however regularly something arrives."""
    silent, partial, slow = connected(api), connected(api, HEAD), connected(api, HEAD)
    with slow:
        until(lambda: not takes(slow, b"X: y\r\n"), within=10)
    assert closed_after(silent) < 10
    assert closed_after(partial) < 10


def test_uvicorn_has_the_same_limits(aws: EmbeddedAws, tmp_path: Path) -> None:
    """With its option `--http`, uvicorn's own command closes silent connections too, and those that are too many."""
    limits: dict[str, Any] = {"api_head_timeout": 2, "api_max_connections": 40}
    with api_process(aws.url, tmp_path / "log", with_uvicorn=True, **limits) as api, ExitStack() as stack:
        assert closed_after(connected(api, HEAD)) < 10
        for _ in range(100):
            stack.enter_context(connected(api))
        assert httpx.get(f"http://127.0.0.1:{api.port}/livez", timeout=20).status_code == 200


def test_a_slow_body_is_closed(api: ApiProcess) -> None:
    """With a key the answer is 408; without one the connection is closed soon after the answer 401."""
    key = f"Authorization: {api.http.headers['authorization']}\r\n".encode()
    for headers, status in ((key, b"408"), (b"", b"401")):
        with connected(api, POST + headers + b"Content-Length: 1000\r\n\r\n{") as connection:
            began, answer = time.monotonic(), b""
            try:
                while time.monotonic() - began < 20:
                    connection.settimeout(0.2)
                    try:
                        answer += (found := connection.recv(2**16))
                    except TimeoutError:
                        connection.sendall(b" ")
                        continue
                    if not found:
                        break
            except (ConnectionResetError, BrokenPipeError):
                pass
            assert time.monotonic() - began < 10
            assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_caller_that_does_not_read_is_closed(api: ApiProcess) -> None:
    """An answer that nobody reads does not hold its connection."""
    path, times = "/static-offline-docs/swagger-ui-bundle.js", 20
    size = len(api.http.get(path).content)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", api.port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * times)
        time.sleep(8)
        read = sum(len(found) for found in iter(lambda: connection.recv(2**16), b""))
    assert 0 < read < size * times


def test_a_kept_connection_outlives_the_times_for_one_request(api: ApiProcess) -> None:
    """Between two requests a connection may rest for longer than a request may take."""
    with httpx.Client(base_url=f"http://127.0.0.1:{api.port}", limits=httpx.Limits(keepalive_expiry=60)) as http:
        first = http.get("/livez").extensions["network_stream"].get_extra_info("socket").getsockname()
        time.sleep(5)
        assert http.get("/livez").extensions["network_stream"].get_extra_info("socket").getsockname() == first


def test_four_hundred_callers_ask_whether_it_is_ready(api: ApiProcess) -> None:
    """All are told so, and the parts are asked about once a second."""
    url = f"http://127.0.0.1:{api.port}/readyz"
    with ThreadPoolExecutor(400) as pool, httpx.Client(limits=httpx.Limits(max_connections=400), timeout=60) as http:
        answers = list(pool.map(lambda _: http.get(url).status_code, range(400)))
    assert answers == [200] * 400


def test_malformed_requests_are_logged_once(api: ApiProcess) -> None:
    """A hundred of them are one line."""
    before = api.log.read_text().count("Invalid HTTP request")
    for _ in range(100):
        assert closed_after(connected(api, b"no HTTP\r\n\r\n")) < 10
    assert api.log.read_text().count("Invalid HTTP request") - before <= 1


def exchanged(api: ApiProcess, *sent: bytes, pause: float = 0.0) -> bytes:
    """Send bytes in a new connection; returns what comes until it is closed, or until nothing comes for two seconds."""
    with connected(api) as connection:
        answer = b""
        try:
            for one in sent:
                connection.sendall(one)
                time.sleep(pause)
            connection.settimeout(2)
            while found := connection.recv(2**16):
                answer += found
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
        return answer


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X: " + b"x" * 100_000,
        HEAD + b"X: y\r\n" * 20_000,
        b"GET /" + b"x" * 100_000,
        b"GET /livez HTTP/1.1\r\n\r\n",
        HEAD + b"Host: other\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000,
    ],
    ids=["long header", "many headers", "long line", "no host", "two hosts", "other encoding", "long chunk extension"],
)
def test_impossible_heads_are_refused(api: ApiProcess, sent: bytes) -> None:
    """The answer is 400, and the connection is closed."""
    answer = exchanged(api, sent)
    assert b"HTTP/1.1 400 " in answer or answer == b""  # a reset may overtake the answer if more was sent than read
    assert b"HTTP/1.1 200 " not in answer.partition(b"HTTP/1.1 400 ")[2]


def test_trailers_are_no_headers(api: ApiProcess) -> None:
    """What follows a chunked body changes nothing about the request, and endless trailers close the connection."""
    key = f"Authorization: {api.http.headers['authorization']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    body = b'{"op":"upsert","entity":"item","key":"k","data":{}}'
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    answer = exchanged(api, POST + key + chunk + b"Idempotency-Key: trailer\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert b"trailer" not in answer
    assert b"HTTP/1.1 202 " not in exchanged(api, POST + key + chunk + b"X: " + b"x" * 100_000)


def test_requests_that_come_at_once_are_answered_in_turn(api: ApiProcess) -> None:
    """A thousand in one go are answered, whatever their bodies are, and use little memory."""
    key = f"Authorization: {api.http.headers['authorization']}\r\n".encode()
    body = b'{"op":"upsert","entity":"item","key":"k","data":{}}'
    post = POST + key + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    get = HEAD + b"\r\n"
    before = api.peak()
    answer = exchanged(api, (get * 9 + post) * 100 + get)
    assert answer.count(b"HTTP/1.1 200 OK") == 901
    assert answer.count(b"HTTP/1.1 202 Accepted") == 100
    assert answer.index(b"HTTP/1.1 202 ") > answer.index(b"HTTP/1.1 200 ")
    assert api.peak() - before < 20 * 2**20


def test_a_request_in_pieces_is_answered(api: ApiProcess) -> None:
    """Its pieces may end anywhere, and the next request follows in the same connection."""
    key = f"Authorization: {api.http.headers['authorization']}\r\n".encode()
    body = b'{"op":"upsert","entity":"item","key":"k","data":{}}'
    whole = POST + key + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) + HEAD + b"\r\n"
    pieces = [whole[start : start + 7] for start in range(0, len(whole), 7)]
    answer = exchanged(api, *pieces, pause=0.001)
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert answer.count(b"HTTP/1.1 200 OK") == 1


def test_another_protocol_is_not_taken(api: ApiProcess) -> None:
    """A client that offers an upgrade gets its answer, and may go on with the connection."""
    upgrade = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n"
    answer = exchanged(api, upgrade, HEAD + b"\r\n", pause=0.5)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_bodies_under_way_are_bounded(aws: EmbeddedAws, tmp_path: Path) -> None:
    """A source has half of the places, so one that holds all of its own holds up no other."""
    with api_process(aws.url, tmp_path / "log", api_max_bodies=4, api_max_body_bytes=2**20) as api:
        key = f"Authorization: {api.http.headers['authorization']}\r\n".encode()
        line = b'{"op":"upsert","entity":"item","key":"k","data":{}}'
        headers = {"Content-Type": "application/x-ndjson"}
        other = api.key("write", source="crm")
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(connected(api, POST + key + b"Content-Length: 1000\r\n\r\n{"))
            time.sleep(1)
            refused = api.http.post("/v1/requests", content=line, headers=headers)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.headers["content-type"] == "application/problem+json"
            began = time.monotonic()
            assert api.http.post("/v1/requests", content=line, headers=headers | other).status_code == 202
            assert time.monotonic() - began < 15
        until(lambda: api.http.post("/v1/requests", content=line, headers=headers).status_code == 202)


def test_bytes_under_way_are_bounded(aws: EmbeddedAws, tmp_path: Path) -> None:
    """All bodies together hold at most eight of the largest size, and those of one source four."""
    with api_process(aws.url, tmp_path / "log", api_max_body_bytes=2**20) as api:
        key = f"Authorization: {api.http.headers['authorization']}\r\n".encode()
        line = b'{"op":"upsert","entity":"item","key":"k","data":{}}'
        headers = {"Content-Type": "application/x-ndjson"}
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(connected(api, POST + key + b"Content-Length: 1048576\r\n\r\n{"))
            time.sleep(1)
            assert api.http.post("/v1/requests", content=line, headers=headers).status_code == 429
            other = headers | api.key("write", source="crm")
            assert api.http.post("/v1/requests", content=line, headers=other).status_code == 202
        until(lambda: api.http.post("/v1/requests", content=line, headers=headers).status_code == 202)


def test_a_burst_of_one_source_waits_for_its_turn(aws: EmbeddedAws, tmp_path: Path) -> None:
    """Bodies that arrive at once and are complete wait for a place, and none is refused."""
    line = b'{"op":"upsert","entity":"item","key":"k","data":{}}'
    headers = {"Content-Type": "application/x-ndjson"}
    with api_process(aws.url, tmp_path / "log", api_max_bodies=4) as api, ThreadPoolExecutor(40) as pool:
        statuses = list(
            pool.map(lambda _: api.http.post("/v1/requests", content=line, headers=headers).status_code, range(80))
        )
    assert statuses == [202] * 80


def test_too_few_files_are_refused_at_the_start(tmp_path: Path) -> None:
    """The message names the setting, the most that is possible, and the limit of files."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024));"
        "from mdstore.cli import main; sys.argv = ['mdstore', 'api', '--port', '1']; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "/usr/bin:/bin", "MDSTORE_API_MAX_CONNECTIONS": "5000"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode != 0
    assert "api_max_connections=5000: expected at most 440" in " ".join(ran.stderr.split())
    assert "(ulimit -n), which is 1024" in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr
