"""An HTTP service on loopback with scripted answers, keys to sign calls with, and a clock that advances only by sleeping."""

from __future__ import annotations

import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from botocore.credentials import ReadOnlyCredentials

from mdstore.aws.retry import Retry

Response = tuple[int, bytes, dict[str, str]]


class FakeTime:
    """A clock that advances only by sleeping."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def retry(self, *, most: bool = True, **changes: float) -> Retry:
        """Return a retry policy whose jitter is always the maximum (`most`), or random."""
        uniform = (lambda _, high: high) if most else random.Random(1).uniform
        return Retry(clock=self.clock, sleep=self.sleep, uniform=uniform, **changes)


class Endpoint:
    """A server that gives scripted answers, repeats the last one, and records the requests and peers that it sees."""

    def __init__(self) -> None:
        self.answers: list[Response] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.lines: list[str] = []
        self.peers: set[tuple[str, int]] = set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                endpoint.lines.append(self.requestline)
                endpoint.peers.add(self.client_address)
                endpoint.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status, content, headers = endpoint.answers[0]
                if len(endpoint.answers) > 1:
                    endpoint.answers.pop(0)
                if status == 0:  # close the connection without a response
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST  # noqa: N815  names that http.server looks up

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def respond_with(self, *answers: tuple[int, Any] | Response) -> None:
        self.answers = []
        for status, content, *rest in answers:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.answers.append((status, text, rest[0] if rest else {}))


class Keys:
    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        return ReadOnlyCredentials("AKIDEXAMPLE", "secret", "session-token")
