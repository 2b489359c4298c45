"""Calls in a process with thousands of open descriptors, and what idle handles keep."""

from __future__ import annotations

import resource
import socket
import sys
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from mdstore.aws.http import ConcurrentCalls, Response, SignedHttp
from mdstore.errors import Unavailable
from tests.unit.endpoint import Endpoint, Keys

_LATENCY = 0.3  # seconds
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def http() -> Iterator[SignedHttp]:
    found = SignedHttp(service="dynamodb", region="eu-central-1", credentials=Keys(), timeout=5)
    yield found
    found.close()


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    """2,000 open descriptors: whatever is opened next has a number above them."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4_096, limits[1]), limits[1]))
    with socket.socket() as one:
        found = [one.fileno()]
        copies = [one.dup() for _ in range(2_000)]
        found += [copy.fileno() for copy in copies]
        yield found
        for copy in copies:
            copy.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def slow() -> Iterator[str]:
    """The URL of a server that answers one call on each connection, after a while."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=_answer_slowly, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _answer_slowly(listener: socket.socket) -> None:
    connections = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            break
        connections.append(connection)
        connection.recv(65_536)
        time.sleep(_LATENCY)
        connection.sendall(_RESPONSE)
    for connection in connections:
        connection.close()


def rounds(concurrent_calls: ConcurrentCalls, timeout: float) -> tuple[int, list[tuple[Any, Any]]]:
    """Wait for all calls; return how often the caller had to ask, and what came back."""
    asked, found = 0, []
    while concurrent_calls:
        asked += 1
        found += concurrent_calls.completed(timeout)
    return asked, found


def test_a_call_does_not_spin_above_1024_descriptors(http: SignedHttp, descriptors: list[int], slow: str) -> None:
    """Waiting for a response takes a handful of rounds and no CPU, whatever the number of the call's descriptor."""
    assert max(descriptors) > 1_024
    with http.concurrent_calls() as concurrent_calls:
        cpu = time.process_time()
        concurrent_calls.start("tag", slow, (), b"body")
        asked, found = rounds(concurrent_calls, 5)
        cpu = time.process_time() - cpu
    assert found == [("tag", Response(200, found[0][1].headers, b"ok"))]
    assert asked < 20
    assert cpu < _LATENCY / 2


def test_a_timeout_is_kept_above_1024_descriptors(descriptors: list[int]) -> None:
    """A silent peer is given up at the call's own timeout, without a busy loop before it."""
    assert max(descriptors) > 1_024
    http = SignedHttp(service="dynamodb", region="x", credentials=Keys(), timeout=0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, http.concurrent_calls() as concurrent_calls:
        concurrent_calls.start(1, f"http://127.0.0.1:{silent.getsockname()[1]}", (), b"")
        asked, found = rounds(concurrent_calls, 60)
    http.close()
    assert isinstance(found[0][1], Unavailable)
    assert asked < 20


def test_a_wait_ends_at_its_timeout(http: SignedHttp, slow: str) -> None:
    """A caller that wants to do something else meanwhile gets control back in time, with nothing."""
    with http.concurrent_calls() as concurrent_calls:
        concurrent_calls.start(1, slow, (), b"")
        concurrent_calls.completed(0.02)
        began = time.monotonic()
        assert concurrent_calls.completed(0.02) == []
        assert time.monotonic() - began < _LATENCY / 2
        _, found = rounds(concurrent_calls, 5)
    assert found[0][1].status == 200


def test_idle_handles_keep_no_bodies(endpoint: Endpoint, http: SignedHttp) -> None:
    """Once a call has ended, nothing but the caller refers to what was sent, in turn and at the same time alike."""
    endpoint.respond_with((200, b"r" * 100_000))
    body = b"x" * 100_000
    references = sys.getrefcount(body)
    http.send(endpoint.url, (), body)
    with http.concurrent_calls() as concurrent_calls:
        for tag in range(3):
            concurrent_calls.start(tag, endpoint.url, (), body)
        rounds(concurrent_calls, 5)
    assert sys.getrefcount(body) == references


def test_calls_in_turn_and_at_the_same_time_keep_their_connections(endpoint: Endpoint, http: SignedHttp) -> None:
    """Two connections serve a caller that alternates: neither way of calling closes the other's."""
    endpoint.respond_with((200, b"ok"))
    for _ in range(3):
        http.send(endpoint.url, (), b"x")
        with http.concurrent_calls() as concurrent_calls:
            concurrent_calls.start(1, endpoint.url, (), b"x")
            rounds(concurrent_calls, 5)
    assert len(endpoint.peers) == 2
