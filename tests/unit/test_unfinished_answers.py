"""Servers that stop in the middle of an answer, or say less than they should: each call ends in time, and is tried again."""

from __future__ import annotations

import io
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event, Thread
from typing import IO, Any

import pytest
from botocore.auth import S3SigV4Auth

from mdstore.aws.http import SignedHttp, Upload
from mdstore.aws.retry import Retry
from mdstore.aws.s3 import Objects, path_url
from mdstore.aws.sqs import Entry, Sqs
from mdstore.errors import Unavailable
from tests.unit.endpoint import Endpoint, FakeTime, Keys
from tests.unit.test_http import expected_signature
from tests.unit.test_sqs import QUEUE, accepted

_TIMEOUT = 0.5  # seconds for a call
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
Serve = Callable[[socket.socket], None]


@contextmanager
def server(serve: Serve) -> Iterator[str]:
    """The URL of a server that handles each connection with `serve`, on a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=_accept, args=(listener, serve), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _accept(listener: socket.socket, serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            serve(connection)

    with suppress(OSError):
        while True:
            Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()


def request(connection: socket.socket) -> bytes:
    """Receive one request; return its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if b"expect: 100-continue" in lines:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    (length,) = (int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
    while len(body) < length:
        body += _more(connection)
    return body


def _more(connection: socket.socket) -> bytes:
    piece = connection.recv(65_536)
    if not piece:
        raise ConnectionResetError
    return piece


@contextmanager
def objects(url: str, *, patience: float = 0) -> Iterator[Objects]:
    http = SignedHttp(service="s3", region="us-east-1", credentials=Keys(), timeout=_TIMEOUT)
    bucket_url = partial(path_url, url, "payloads")
    yield Objects(bucket="payloads", bucket_url=bucket_url, http=http, retry=Retry(patience=patience))
    http.close()


def ended(call: Callable[[], object], within: float) -> tuple[object, float]:
    """Make a call on a thread; return its result or error, and the CPU seconds that the process took for it."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)
        done.set()

    done, cpu = Event(), time.process_time()
    Thread(target=work, daemon=True).start()
    assert done.wait(within), "the call has not ended"
    return found[0], time.process_time() - cpu


# -- S3


def half_a_continue(connection: socket.socket) -> None:
    """Read the headers, and end between `100 Continue` and its blank line."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 100 Continue\r\n")
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65_536):
        pass


def a_header_for_ever(connection: socket.socket) -> None:
    """Read the request, and answer with a header that does not end, a byte at a time."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


def a_body_for_ever(connection: socket.socket) -> None:
    """Answer with a body that does not end, a byte at a time."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
@pytest.mark.parametrize("serve", [half_a_continue, a_header_for_ever, a_body_for_ever])
def test_a_write_ends_in_time(serve: Serve, size: int) -> None:
    """Whatever a peer does not say, the call fails within its limit, and waits for it without a busy loop."""
    with server(serve) as url, objects(url) as found:
        error, cpu = ended(lambda: found.put_new("payloads/r1", b"x" * size), 15)
    assert isinstance(error, Unavailable)
    assert cpu < 3  # most of it for the first client of a process; a busy loop takes all of the 15


@pytest.mark.parametrize("serve", [a_header_for_ever, a_body_for_ever])
def test_a_check_of_the_bucket_ends_in_time(serve: Serve) -> None:
    """Readiness does not hang on a bucket that answers for ever."""
    with server(serve) as url, objects(url) as found:
        error, _ = ended(found.ping, 15)
    assert isinstance(error, Unavailable)


def test_a_write_is_sent_again_as_a_whole_when_a_kept_connection_ends() -> None:
    """The peer may close a connection at any time: libcurl opens another one, and rewinds what it has sent."""
    bodies: list[bytes] = []
    connections: list[int] = []

    def serve(connection: socket.socket) -> None:
        connections.append(1)
        bodies.append(request(connection))
        connection.sendall(_OK)
        if len(connections) == 1:
            bodies.append(request(connection))  # read, and hang up

    file = io.BytesIO(b"second" * 1_000)
    with server(serve) as url, objects(url) as found:
        assert found.put_new("a", b"first")
        assert found.put_new("b", file)
    assert bodies == [b"first", b"second" * 1_000, b"second" * 1_000]


@pytest.mark.parametrize("make", [bytes, io.BytesIO])
@pytest.mark.parametrize("content", [b"", b"x" * 100_000, b"x" * 3_000_000])
def test_a_write_is_signed_with_its_digest(
    endpoint: Endpoint, make: Callable[[bytes], bytes | IO[bytes]], content: bytes
) -> None:
    """S3 refuses a body that was damaged on its way: its SHA-256 is in the signature and in a checksum that S3 stores."""
    endpoint.respond_with((200, b""))
    with objects(endpoint.url) as found:
        assert found.put_new("payloads/2026-11-23/air:ports", make(content)) is True
    ((headers, body),) = endpoint.requests
    assert body == content
    assert int(headers["content-length"]) == len(content)
    signer = S3SigV4Auth(Keys().get_frozen_credentials(), "s3", "us-east-1")
    wanted = expected_signature(signer, endpoint.url, endpoint.lines[0], headers, body)
    assert headers["authorization"].endswith(f"Signature={wanted}")
    for name in ("if-none-match", "x-amz-checksum-sha256", "x-amz-content-sha256"):
        assert name in headers["authorization"]


@pytest.mark.parametrize("content", [b"", b"content"])
def test_a_handle_that_uploaded_serves_other_calls(endpoint: Endpoint, content: bytes) -> None:
    """A POST and a GET after an upload on the same connection are signed and sent as ever."""
    endpoint.respond_with((200, b"ok"))
    http = SignedHttp(service="s3", region="us-east-1", credentials=Keys())
    http.send(endpoint.url + "/b/k", (), Upload(io.BytesIO(content), len(content)))
    http.send(endpoint.url + "/b/k", (), b"posted")
    http.send(endpoint.url + "/b/k")
    http.close()
    assert [line.split()[0] for line in endpoint.lines] == ["PUT", "POST", "GET"]
    assert [body for _, body in endpoint.requests] == [content, b"posted", b""]
    assert len(endpoint.peers) == 1
    signer = S3SigV4Auth(Keys().get_frozen_credentials(), "s3", "us-east-1")
    for line, (headers, body) in list(zip(endpoint.lines, endpoint.requests, strict=True))[1:]:
        wanted = expected_signature(signer, endpoint.url, line, headers, body)
        assert headers["authorization"].endswith(f"Signature={wanted}")


def test_an_idle_handle_keeps_no_file(endpoint: Endpoint) -> None:
    """A file that was uploaded is the caller's alone again."""
    endpoint.respond_with((200, b""))
    file = io.BytesIO(b"x")
    references = sys.getrefcount(file)
    with objects(endpoint.url) as found:
        found.put_new("a", file)
        assert sys.getrefcount(file) == references


CUT = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n",
    b"HTTP/1.1 404 Not Found\r\nX-Amz-Re",
    b"HTTP/1.1 100 Continue\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nETag:",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx",
]


@pytest.mark.parametrize("said", CUT, ids=range(len(CUT)))
def test_an_answer_that_is_cut_is_none(said: bytes) -> None:
    """Neither is the object stored, nor is it missing: the call is made again, one by one and at the same time alike."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(said)

    with server(serve) as url, objects(url) as found:
        assert isinstance(ended(lambda: found.put_new("a", b"x"), 15)[0], Unavailable)
        assert isinstance(ended(lambda: found.get("a", 0, 1), 15)[0], Unavailable)
        with found._http.concurrent_calls() as concurrent_calls:
            concurrent_calls.start(1, url, (), b"x")
            while not (completed_calls := concurrent_calls.completed(5)):
                pass
        assert isinstance(completed_calls[0][1], Unavailable)


# -- SQS


@pytest.fixture
def sqs(endpoint: Endpoint, time: FakeTime) -> Iterator[Sqs]:
    http = SignedHttp(service="sqs", region="eu-central-1", credentials=Keys())
    yield Sqs(http=http, endpoint=endpoint.url, retry=time.retry(base=1, patience=5))
    http.close()


def entries(*bodies: str) -> list[Entry]:
    return [Entry(message_body=body) for body in bodies]


@pytest.mark.parametrize("nothing", [b"", b"{}", b"null", b"[]", b'{"Successful":[]}'])
def test_a_batch_that_nothing_is_said_of_is_sent_again(endpoint: Endpoint, sqs: Sqs, nothing: bytes) -> None:
    """A 200 that names no entry says of none that it is in the queue."""
    endpoint.respond_with((200, nothing), (200, accepted("x", "y")))
    assert sqs.send(QUEUE, entries("x", "y")) == [None, None]
    assert len(endpoint.requests) == 2


def test_an_entry_that_an_answer_leaves_out_is_sent_again(endpoint: Endpoint, sqs: Sqs) -> None:
    """The others are not."""
    first, second = accepted("x", "y")["Successful"]
    endpoint.respond_with((200, {"Successful": [first]}), (200, {"Successful": [second]}))
    assert sqs.send(QUEUE, entries("x", "y")) == [None, None]
    sent = [[one["Id"] for one in json.loads(body)["Entries"]] for _, body in endpoint.requests]
    assert sent == [["0", "1"], ["1"]]


@pytest.mark.parametrize("operation", ["SendMessage", "ReceiveMessage", "GetQueueUrl"])
def test_a_call_without_its_output_is_made_again(endpoint: Endpoint, sqs: Sqs, operation: str) -> None:
    """An empty body is no output: what should have been there is asked for again."""
    endpoint.respond_with((200, b""), (200, {"MessageId": "m"}))
    assert sqs.call(operation, {}) == {"MessageId": "m"}


@pytest.mark.parametrize("operation", ["PurgeQueue", "DeleteMessage", "SetQueueAttributes"])
def test_a_call_that_has_no_output_may_answer_with_nothing(endpoint: Endpoint, sqs: Sqs, operation: str) -> None:
    """SQS answers these with an empty body."""
    endpoint.respond_with((200, b""))
    body: dict[str, Any] = sqs.call(operation, {})
    assert body == {}
    assert len(endpoint.requests) == 1
