"""Large data of a lane: the calls to S3 of its transactions run at the same time, over the embedded AWS."""

from __future__ import annotations

import http.client
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any
from uuid import uuid4

import pytest

from mdstore.errors import DeploymentBroken, NotFound
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import Counts, Operation, Reference
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings
from mdstore.store import Store

_TOGETHER = 3  # calls to blobs that a proxy waits for
_PATIENCE = 10.0  # seconds


class Proxy:
    """S3 behind a proxy that, while it is `gathering`, answers no call for a blob before three of its kind are there.

    `missed` lists the calls that the others did not join.
    """

    def __init__(self, upstream: str) -> None:
        self.gathering = False
        self.missed: list[str] = []
        barriers = {method: Barrier(_TOGETHER) for method in ("GET", "PUT")}
        host = upstream.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.gathering and "/blobs/" in self.path:
                    try:
                        barriers[self.command].wait(_PATIENCE)
                    except BrokenBarrierError:
                        proxy.missed.append(self.requestline)
                upstream = http.client.HTTPConnection(host)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                upstream.close()

            do_PUT = do_HEAD = do_GET  # noqa: N815  the server calls them so

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    found = Proxy(upstream)
    yield found
    found.close()


def settings_at(aws: EmbeddedAws, **environ: str) -> Settings:
    """A provisioned namespace of its own."""
    made = {"MDSTORE_NAMESPACE": f"s3-{uuid4().hex[:12]}", "AWS_ENDPOINT_URL": aws.url, **environ}
    settings = load_settings(made).settings
    for _ in provision(settings):
        pass
    return settings


def apply(store: Store, operations: list[Operation]) -> Counts:
    sent: list[Reference] = []
    store.ingestor.accept(operations, publish=sent.append)
    (reference,) = sent
    return store.writer.apply_lane(reference, 0).counts


def large(name: str) -> dict[str, str]:
    """Data of 600 KB that is its own transaction, and does not compress to nothing."""
    return {name: random.Random(name).randbytes(300_000).hex()}


def test_the_large_data_of_a_lane_moves_at_the_same_time(aws: EmbeddedAws) -> None:
    """Each transaction's reads and writes of S3 are calls like any other: none of them holds up the others' ones."""
    keys = [f"k{number}" for number in range(_TOGETHER)]
    with proxied(aws.url) as proxy:
        store = Store(settings_at(aws, AWS_ENDPOINT_URL_S3=proxy.url))
        proxy.gathering = True
        inserts = [Operation(op="insert", entity="e", key=key, data=large(f"{key}-old")) for key in keys]
        assert apply(store, inserts).applied == {"insert": _TOGETHER}
        patches = [Operation(op="patch", entity="e", key=key, data=large(f"{key}-new")) for key in keys]
        assert apply(store, patches).applied == {"patch": _TOGETHER}
        assert proxy.missed == []
        proxy.gathering = False
        for key in keys:
            assert store.records.get("e", key).data == large(f"{key}-old") | large(f"{key}-new")


def test_objects_are_stored_once_and_read_back(aws: EmbeddedAws) -> None:
    """Empty, small and large ones, at a real service; the second write of a key is told that it comes late."""
    objects = Store(settings_at(aws)).objects
    for size in (0, 10, 3_000_000):
        content = random.Random(size).randbytes(size)
        assert objects.put_new(f"payloads/{size}", content) is True
        assert objects.put_new(f"payloads/{size}", b"other") is False
        assert objects.get(f"payloads/{size}", 0, size + 1) == content
    with pytest.raises(NotFound):
        objects.get("payloads/other", 0, 1)


def test_a_bucket_is_reached_or_named(aws: EmbeddedAws) -> None:
    """A check of the bucket says that it is there, or which one is not."""
    settings = settings_at(aws)
    Store(settings).objects.ping()
    with pytest.raises(DeploymentBroken, match="nowhere"):
        Store(settings.model_copy(update={"bucket": "nowhere"})).objects.ping()
