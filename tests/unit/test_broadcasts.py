"""Commands, answers and events: what a worker accepts, and what is refused before anything else reads it."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest

from mdstore.queue.broker.envelope import Malformed
from mdstore.queue.control.broadcasts import EXPIRY_TOLERANCE, unwrap, wrap
from mdstore.queue.control.topics import Kind

REPLY_EXCHANGE = "reply.md-control.pidbox"
COMMAND: dict[str, Any] = {"method": "ping", "arguments": {}, "destination": None, "pattern": None, "matcher": None}
EVENT = {"type": "task-received", "hostname": "w@h", "timestamp": 1.5, "clock": 7, "uuid": "u", "utcoffset": -1}


def text(content: Any, *, encoding: str | None = "base64", headers: Any = None, **envelope: Any) -> str:
    raw = content if isinstance(content, str) else json.dumps(content)
    return json.dumps(
        {
            "body": base64.b64encode(raw.encode()).decode() if encoding else raw,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"clock": 3, "expires": time.time() + 3_600} if headers is None else headers,
            "properties": {"body_encoding": encoding, "delivery_tag": "theirs", "delivery_info": {"exchange": "x"}},
            **envelope,
        }
    )


def opened(kind: Kind, message: str) -> dict[str, Any]:
    return unwrap(kind, message, tag="mine", reply_exchange=REPLY_EXCHANGE)


@pytest.mark.parametrize("encoding", ["base64", None])
def test_a_command_keeps_only_the_checked_fields(encoding: str | None) -> None:
    """Body and known headers are kept, the delivery tag is the receiver's own, and all other fields are dropped."""
    reply_to = {"exchange": REPLY_EXCHANGE, "routing_key": "0123456789abcdef0123"}
    command = {**COMMAND, "ticket": "t", "reply_to": reply_to}
    message = text(
        command, encoding=encoding, headers={"expires": time.time() + 3_600, "clock": 3, "compression": "zlib"}
    )

    payload = opened(Kind.CONTROL, message)

    assert json.loads(payload["body"]) == command
    assert set(payload["headers"]) == {"clock", "expires"}
    assert payload["properties"] == {"delivery_tag": "mine", "delivery_info": {}, "body_encoding": None}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "malformed"),
        ("[]", "Expected `object`"),
        (text(COMMAND, **{"content-type": "application/x-python-serialize"}), "Invalid enum value"),
        (text(COMMAND, **{"content-encoding": "utf-16"}), "Invalid enum value"),
        (text("{}"), "missing required field `method`"),
        (text({**COMMAND, "method": 5}), "Expected `str`"),
        (text({**COMMAND, "method": "x" * 501}), "length <= 500"),
        (text({**COMMAND, "arguments": ["shutdown"]}), "Expected `object | null`"),
        (text({**COMMAND, "destination": "w@h"}), "Expected `array | null`"),
        (text({**COMMAND, "kwargs": {}}), "unknown field `kwargs`"),
        (text({**COMMAND, "reply_to": {"exchange": REPLY_EXCHANGE, "routing_key": "../tasks"}}), "matching regex"),
        (text({**COMMAND, "reply_to": {"exchange": "", "routing_key": "0" * 20}}), "length >= 1"),
        (text({**COMMAND, "reply_to": {"exchange": "tasks", "routing_key": "0" * 20}}), "to another exchange"),
        (text(COMMAND, headers={"clock": -1, "expires": time.time() + 3_600}), ">= 0"),
        (text(COMMAND, headers={"clock": 10**20, "expires": time.time() + 3_600}), "$.headers.clock"),
        (text(COMMAND, body="!!!"), "Only base64 data"),
        (text('{"method":"x","arguments":{"a":' + "[" * 100_000), "recursion"),
    ],
)
def test_invalid_commands_are_refused(message: str, reason: str) -> None:
    """Any other text raises `Malformed` with the reason, and no other error."""
    with pytest.raises(Malformed) as caught:
        opened(Kind.CONTROL, message)
    assert reason in str(caught.value)


@pytest.mark.parametrize("expires", [None, 0, 1_700_000_000, -EXPIRY_TOLERANCE - 1])
def test_a_stale_command_is_refused(expires: float | None) -> None:
    """A command that expired over 30 s ago, or has no expiry time, is refused; one that expired just before is accepted."""
    when = time.time() + expires if expires is not None and expires < 0 else expires
    with pytest.raises(Malformed, match="'shutdown' is stale"):
        opened(Kind.CONTROL, text({**COMMAND, "method": "shutdown"}, headers={"expires": when}))
    assert opened(Kind.CONTROL, text(COMMAND, headers={"expires": time.time() - EXPIRY_TOLERANCE + 5}))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"type": "task-received"}, "missing required field `hostname`"),
        ([{**EVENT, "uuid": None}], "names no task"),
        ([{**EVENT, "clock": None}], "has no clock"),
        ([EVENT, {**EVENT, "timestamp": "now"}], "Expected `float`"),
        ([EVENT, 5], "Expected `object`"),
        ("x", "malformed"),
    ],
)
def test_invalid_events_are_refused(body: Any, reason: str) -> None:
    """Otherwise a listener would crash on it, and lose its connection with all messages that wait there."""
    with pytest.raises(Malformed) as caught:
        opened(Kind.EVENTS, text(body))
    assert reason in str(caught.value)


def test_one_event_and_lists_of_events_are_accepted() -> None:
    """A client's `task-sent` is accepted too, although it has no clock."""
    sent = {**EVENT, "type": "task-sent", "clock": None}
    for body in (EVENT, [EVENT, {"type": "worker-online", "hostname": "w", "timestamp": 1, "clock": 1}], [sent]):
        assert json.loads(opened(Kind.EVENTS, text(body))["body"]) == body
        assert json.loads(opened(Kind.EVENTS, wrap(json.dumps(body)))["body"]) == body


def test_an_answer_names_its_node() -> None:
    """An answer is an object with a key per node; anything else is refused."""
    payload = opened(Kind.REPLY, text({"w@h": {"ok": "pong"}}, headers={"ticket": "t", "clock": 1}))
    assert payload["headers"] == {"ticket": "t", "clock": 1}
    with pytest.raises(Malformed):
        opened(Kind.REPLY, text(["pong"]))
