"""A proxy that counts a worker's calls and answers, and changes them in ways that microburst cannot.

It runs between the worker and microburst, so it counts what the worker sent and received.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

#: The code of a call that got no whole answer.
NOTHING = "nothing"
#: The code of a transaction that was cancelled because the receipt that its last action puts already existed.
RECEIPT = "receipt"
_DROPPED = frozenset({"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"})
_TOKEN = re.compile(rb'"ClientRequestToken":"([^"]+)"')
_XML_CODE = re.compile(rb"<Code>(\w+)</Code>")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call to AWS. `name` is DynamoDB's operation or S3's method; `place` is the path and the byte range."""

    name: str
    method: str
    path: str
    place: str
    headers: dict[str, str]
    body: bytes

    @property
    def token(self) -> str:
        """The `ClientRequestToken` of a transaction, or an empty text."""
        found = _TOKEN.search(self.body)
        return found[1].decode() if found else ""


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer of AWS. If `sent` is given, that many bytes of the body are sent before the connection is reset."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    sent: int | None = None

    @property
    def code(self) -> str:
        """The answer in one word: `ok`, AWS's error code, `receipt` or `nothing`."""
        if self.sent is not None:
            return NOTHING
        if self.status < 300:
            return "ok"
        if found := _XML_CODE.search(self.body):
            return found[1].decode()
        try:
            error = json.loads(self.body)
            reasons = error.get("CancellationReasons") or [{}]
            if len(reasons) > 1 and reasons[-1].get("Code") == "ConditionalCheckFailed":
                return RECEIPT
            return str(error["__type"]).rpartition("#")[2]
        except (ValueError, LookupError):
            return f"HTTP{self.status}"


class Proxy:
    """A proxy that forwards calls to `upstream`. Use it as a context manager.

    `on_call` may change a call before it is forwarded, and `on_answer` may change its answer. `answers` counts calls by name
    and code, `tokens` the tokens of transactions as the worker sent them; `reused` lists tokens sent with two different bodies.
    """

    def __init__(self, upstream: str) -> None:
        self.on_call: Callable[[Call], Call] = lambda call: call
        self.on_answer: Callable[[Call, Response], Response] = lambda _, answer: answer
        self.answers: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self._bodies: dict[str, bytes] = {}
        self.reused: list[str] = []
        self.under_way = 0
        self._upstream = urlsplit(upstream).netloc
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, *codes: str, name: str | None = None) -> int:
        """Return how many calls of `name`, or of any name, ended with one of `codes`, or with any code."""
        return sum(
            number
            for (called, code), number in self.answers.items()
            if (name is None or called == name) and (not codes or code in codes)
        )

    @property
    def repeats(self) -> int:
        """How many transactions were sent with a token that was sent before."""
        return self.tokens.total() - len(self.tokens)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1
            timeout = 60

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with proxy._counted_as_under_way():
                    answer = proxy._answer(self.command, self.path, dict(self.headers.items()), body)
                if answer is None:
                    self._drop()
                    return
                self.send_response_only(answer.status)
                for name, value in answer.headers:
                    if name.lower() not in _DROPPED:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.sent])
                self.wfile.flush()
                if answer.sent is not None:
                    self._drop()

            do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815  the base class requires these names

            def handle_expect_100(self) -> bool:
                goes_on = super().handle_expect_100()
                self.wfile.flush()  # boto3 waits up to a second for this line
                return goes_on

            def _drop(self) -> None:
                """Reset the connection instead of closing it in order."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    @contextmanager
    def _counted_as_under_way(self) -> Iterator[None]:
        with self._lock:
            self.under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Response | None:
        target = headers.get("X-Amz-Target", "")
        call = Call(
            name=target.rpartition(".")[2] or method,
            method=method,
            path=path,
            place=f"{path} {headers.get('Range', '')}",
            headers={name: value for name, value in headers.items() if name.lower() not in (*_DROPPED, "expect")},
            body=body,
        )
        self._record_token(call)
        call = self.on_call(call)
        answer = self._forward(call)
        if answer is not None:
            answer = self.on_answer(call, answer)
        with self._lock:
            self.answers[call.name, answer.code if answer else NOTHING] += 1
        return answer

    def _record_token(self, call: Call) -> None:
        if token := call.token:
            digest = hashlib.sha256(call.body).digest()
            with self._lock:
                self.tokens[token] += 1
                if self._bodies.setdefault(token, digest) != digest:
                    self.reused.append(token)

    def _forward(self, call: Call) -> Response | None:
        """Return the upstream's answer, or None if the connection broke before its end."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(call.method, call.path, call.body, {**call.headers, "Connection": "close"})
            answer = connection.getresponse()
            return Response(status=answer.status, headers=answer.getheaders(), body=answer.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def shutdown_request(self, request: Any) -> None:
        # The inherited method first shuts the connection down in order, so a reset would not be one.
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that a worker closed; the proxy did nothing wrong."""


class FailAfterwards:
    """An `on_answer` that answers every `every`th transaction that applied with a 500."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._lock = threading.Lock()
        self._applied = 0
        self.failed = 0

    def __call__(self, call: Call, answer: Response) -> Response:
        if call.name != "TransactWriteItems" or answer.code != "ok":
            return answer
        with self._lock:
            self._applied += 1
            if self._applied % self._every:
                return answer
            self.failed += 1
        body = b'{"__type":"com.amazonaws.dynamodb.v20120810#InternalServerError","message":"after the fact"}'
        headers = [(name, value) for name, value in answer.headers if name.lower() != "x-amz-crc32"]
        return Response(status=500, headers=headers, body=body)


class ForgetTokens:
    """An `on_call` that replaces a token that was sent before, as if DynamoDB's ten minutes had passed since."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self.forgotten = 0

    def __call__(self, call: Call) -> Call:
        with self._lock:
            if not call.token or call.token not in self._seen:
                self._seen.add(call.token)
                return call
            self.forgotten += 1
        return replace(call, body=call.body.replace(call.token.encode(), str(uuid4()).encode()))


class SpoilReads:
    """An `on_answer` that spoils the first three reads of each place in S3: cut off, with a damaged byte, and half as long."""

    WAYS = ("cut", "damaged", "short")

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.spoilt: Counter[str] = Counter()

    def __call__(self, call: Call, answer: Response) -> Response:
        if call.name != "GET" or answer.status >= 300:
            return answer
        with self._lock:
            reads = self._seen[call.place]
            self._seen[call.place] += 1
            if reads >= len(self.WAYS):
                return answer
            way = self.WAYS[reads]
            self.spoilt[way] += 1
        middle = len(answer.body) // 2
        if way == "cut":
            return replace(answer, sent=middle)
        if way == "short":
            return replace(answer, body=answer.body[:middle])
        flipped = bytes([answer.body[middle] ^ 0x55])
        return replace(answer, body=answer.body[:middle] + flipped + answer.body[middle + 1 :])
