"""The recorder's post office: messages stay in its hands, and it executes those that it chooses, one by one.

A message is executed as a worker's pool process does it, by Celery's own tracer, so all that the code writes is written by
the code. Calls to AWS can be answered with an error, to leave work half-done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from celery.app.trace import trace_task_ret

from tests.chaos.proxy import Call, Proxy, Response
from tests.compat.corpus import Environment, Letter

NOT_NOW = (503, "ServiceUnavailable")
DENIED = (400, "AccessDeniedException")
_REFUSED = "Refused"


class Post:
    """The messages of one namespace. `kept` are those that become part of the corpus."""

    def __init__(self, environment: Environment, proxy: Proxy) -> None:
        self.environment = environment
        self.kept: dict[str, Letter] = {}
        self._proxy = proxy

    def take(self, *names: str, queue: str = "") -> list[Letter]:
        """Take as many messages as there are names from a queue; those that are named are kept."""
        found = self.environment.receive(queue or self.environment.settings.queue, count=len(names))
        self.kept |= {name: letter for name, letter in zip(names, found, strict=True) if name}
        return found

    def one(self, name: str = "", *, queue: str = "") -> Letter:
        """Take one message."""
        (letter,) = self.take(name, queue=queue)
        return letter

    def tasks(self, count: int) -> dict[str, Letter]:
        """Take `count` messages; returns them by their tasks' ids."""
        return {header(letter)["id"]: letter for letter in self.take(*[""] * count)}

    @contextmanager
    def refusing(self, operation: str, answer: tuple[int, str], *, after: int = 0) -> Iterator[None]:
        """Answer all but the first calls of an operation with an error; they do not reach AWS."""
        calls = 0

        def on_call(call: Call) -> Call:
            nonlocal calls
            calls += call.name == operation
            if call.name != operation or calls <= after:
                return call
            return replace(call, name=_REFUSED, method="GET", path="/_ministack/health", headers={}, body=b"")

        def on_answer(call: Call, given: Response) -> Response:
            if call.name != _REFUSED:
                return given
            status, code = answer
            body = json.dumps({"__type": f"com.amazonaws#{code}", "message": "by the recorder"}).encode()
            return Response(status=status, headers=[("Content-Type", "application/x-amz-json-1.0")], body=body)

        former = self._proxy.on_call, self._proxy.on_answer
        self._proxy.on_call, self._proxy.on_answer = on_call, on_answer
        try:
            yield
        finally:
            self._proxy.on_call, self._proxy.on_answer = former
        assert calls > after, f"{operation} was not called"


def execute(app: Any, letter: Letter, *, receives: int = 1) -> None:
    """Execute a message, as if SQS had delivered it `receives` times."""
    message = json.loads(letter.body)
    headers, properties = message["headers"], message["properties"]
    request = {
        **headers,
        "receives": receives,
        "properties": properties,
        "reply_to": properties["reply_to"],
        "correlation_id": properties["correlation_id"],
        "delivery_info": properties["delivery_info"],
    }
    app.set_current()  # as a worker does
    kind, encoding = message["content-type"], message["content-encoding"]
    trace_task_ret(headers["task"], headers["id"], request, message["body"], kind, encoding, app=app)


def header(letter: Letter) -> dict[str, Any]:
    """Read a message's headers."""
    headers: dict[str, Any] = json.loads(letter.body)["headers"]
    return headers


def arguments(letter: Letter) -> list[Any]:
    """Read a message's positional arguments."""
    found: list[Any] = json.loads(json.loads(letter.body)["body"])[0]
    return found
