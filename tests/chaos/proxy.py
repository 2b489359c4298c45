"""A proxy that counts what a worker asks and is told, and spoils calls and answers in ways that microburst cannot.

It stands between the worker and microburst, so what it counts is what the worker saw.
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

#: What a call ended with where there was no whole answer.
NOTHING = "nothing"
#: A transaction that was cancelled because its last action, the receipt's put, found the receipt there.
RECEIPT = "receipt"
_DROPPED = frozenset({"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"})
_TOKEN = re.compile(rb'"ClientRequestToken":"([^"]+)"')
_XML_CODE = re.compile(rb"<Code>(\w+)</Code>")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call on its way to AWS. `name` is DynamoDB's operation, or S3's method; `place` the path and the range."""

    name: str
    method: str
    path: str
    place: str
    headers: dict[str, str]
    body: bytes

    @property
    def token(self) -> str:
        """The `ClientRequestToken` of a transaction, else nothing."""
        found = _TOKEN.search(self.body)
        return found[1].decode() if found else ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer on its way back; of its body `sent` bytes are sent before the connection is dropped, all where None."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    sent: int | None = None

    @property
    def code(self) -> str:
        """`ok`, AWS's error code, `receipt` or `nothing`."""
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
    """Passes calls on to `upstream`. Use as a context manager.

    `on_call` may change a call before it is passed on, `on_answer` its answer. Counted are the calls' `answers` by name and
    code, and the `tokens` of transactions as the worker sent them; `forged` are those that came with two bodies.
    """

    def __init__(self, upstream: str) -> None:
        self.on_call: Callable[[Call], Call] = lambda call: call
        self.on_answer: Callable[[Call, Answer], Answer] = lambda _, answer: answer
        self.answers: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self._bodies: dict[str, bytes] = {}
        self.forged: list[str] = []
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
        """Calls (named `name`) that ended with one of `codes`, or all."""
        return sum(
            number
            for (called, code), number in self.answers.items()
            if (name is None or called == name) and (not codes or code in codes)
        )

    @property
    def repeats(self) -> int:
        """How often a transaction's token came again."""
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
                with proxy._noted():
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

            do_GET = do_PUT = do_HEAD = do_POST  # noqa: N815  the server calls them so

            def handle_expect_100(self) -> bool:
                goes_on = super().handle_expect_100()
                self.wfile.flush()  # boto3 waits a second for it
                return goes_on

            def _drop(self) -> None:
                """A reset, and not an orderly end."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    @contextmanager
    def _noted(self) -> Iterator[None]:
        with self._lock:
            self.under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        target = headers.get("X-Amz-Target", "")
        call = Call(
            name=target.rpartition(".")[2] or method,
            method=method,
            path=path,
            place=f"{path} {headers.get('Range', '')}",
            headers={name: value for name, value in headers.items() if name.lower() not in (*_DROPPED, "expect")},
            body=body,
        )
        self._note_token(call)
        call = self.on_call(call)
        answer = self._pass_on(call)
        if answer is not None:
            answer = self.on_answer(call, answer)
        with self._lock:
            self.answers[call.name, answer.code if answer else NOTHING] += 1
        return answer

    def _note_token(self, call: Call) -> None:
        if token := call.token:
            digest = hashlib.sha256(call.body).digest()
            with self._lock:
                self.tokens[token] += 1
                if self._bodies.setdefault(token, digest) != digest:
                    self.forged.append(token)

    def _pass_on(self, call: Call) -> Answer | None:
        """The answer from behind; None where the connection broke before its end."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(call.method, call.path, call.body, {**call.headers, "Connection": "close"})
            answer = connection.getresponse()
            return Answer(status=answer.status, headers=answer.getheaders(), body=answer.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def shutdown_request(self, request: Any) -> None:
        # The inherited one ends the connection in order first, and what is to be a reset would be none.
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that gave up is no error of the proxy's."""


class FailAfterwards:
    """For `on_answer`: each `every`th transaction that applied is answered with a 500."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._lock = threading.Lock()
        self._applied = 0
        self.failed = 0

    def __call__(self, call: Call, answer: Answer) -> Answer:
        if call.name != "TransactWriteItems" or answer.code != "ok":
            return answer
        with self._lock:
            self._applied += 1
            if self._applied % self._every:
                return answer
            self.failed += 1
        body = b'{"__type":"com.amazonaws.dynamodb.v20120810#InternalServerError","message":"after the fact"}'
        headers = [(name, value) for name, value in answer.headers if name.lower() != "x-amz-crc32"]
        return Answer(status=500, headers=headers, body=body)


class ForgetTokens:
    """For `on_call`: a token that was seen before becomes another, as if ten minutes had gone by since."""

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
    """For `on_answer`: of each place in S3 the first answers are cut short, damaged, and shorter than they should be."""

    WAYS = ("cut", "damaged", "short")

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.spoilt: Counter[str] = Counter()

    def __call__(self, call: Call, answer: Answer) -> Answer:
        if call.name != "GET" or answer.status >= 300:
            return answer
        with self._lock:
            turn = self._seen[call.place]
            self._seen[call.place] += 1
            if turn >= len(self.WAYS):
                return answer
            way = self.WAYS[turn]
            self.spoilt[way] += 1
        middle = len(answer.body) // 2
        if way == "cut":
            return replace(answer, sent=middle)
        if way == "short":
            return replace(answer, body=answer.body[:middle])
        flipped = bytes([answer.body[middle] ^ 0x55])
        return replace(answer, body=answer.body[:middle] + flipped + answer.body[middle + 1 :])
