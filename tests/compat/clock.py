"""Moves a recorded corpus to the present, because some code compares what is recorded with the clock.

A request is refused after 14 days, an item is deleted after its TTL, a command to workers is stale after half a minute. A
corpus must still be readable after years, so its times are moved when it is loaded. Every function here is pure.

What is moved, and how:

    TTLs (`expires_at`, `ttl`)           always, by whole hours; an emulator deletes expired items as DynamoDB does
    other times of items                 by the same hours, and only where workers act on them: see `Move`
    places in the due-time table         their hours and milliseconds are part of the keys; the digests in the keys are opaque
    `created_at` in a payload's header   by the same seconds; ten digits stay ten digits, so nothing changes its place
    digests of these headers             replaced wherever they are referred to: messages, ledger, callbacks of chords
    `eta` of messages                    by the same hours, so that a worker does not wait for what the due-time table calls due
    `expires` of a command to workers    set to half a minute from now when it is published

Whole hours, because the due-time table has a partition an hour. What is loaded is between one and two hours old, whenever
that is.

A faked clock was the alternative. It would have to be faked in every process and in C (libcurl signs calls), and the emulator
would disagree with it. Moving the header costs one honest change: its digest is another. The test of what is only read
therefore uses payloads byte for byte as they were recorded.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

Item = dict[str, Any]  # DynamoDB JSON

HOUR = 3_600
TTLS = frozenset({"expires_at", "ttl"})  # Unix seconds
SECONDS = frozenset({"at", "look_at", "opened_at"})
MILLISECONDS = frozenset({"accepted_at", "started_at", "finished_at", "created_at", "updated_at", "due"})
_ETA = re.compile(r'(?<=eta\\":\\")[0-9T:.+-]+(?=\\")')  # in JSON, in a JSON string
_CREATED_AT = re.compile(rb'(?<="created_at":)\d{10}(?=[,}])')
_MAGIC = b"MDS1"


@dataclass(frozen=True, kw_only=True)
class Move:
    """How far times move, in seconds: a multiple of an hour. Unless it is `whole`, only TTLs move."""

    seconds: int
    whole: bool

    @classmethod
    def to_present(cls, recorded_at: float, now: float, *, whole: bool) -> Move:
        """Make a recording of `recorded_at` one to two hours old."""
        return cls(seconds=(int(now - recorded_at) // HOUR - 1) * HOUR, whole=whole)


def moved_item(item: Item, move: Move) -> Item:
    """Move an item of any table but the due-time table."""
    units = dict.fromkeys(TTLS, 1)
    if move.whole:
        units |= dict.fromkeys(SECONDS, 1) | dict.fromkeys(MILLISECONDS, 1_000)
    return {name: _later(value, move.seconds * units[name]) if name in units else value for name, value in item.items()}


def moved_due_item(item: Item, move: Move) -> Item:
    """Move an item of the due-time table: a message, or the state of the table."""
    if not move.whole:
        return moved_item(item, move)
    if item["pk"]["S"] == "drain":
        units = {"since": 1 / HOUR, "first": 1 / HOUR, "until": 1_000}
        return {
            name: _later(value, round(move.seconds * units[name.partition("#")[0]])) if "N" in value else value
            for name, value in item.items()
        }
    hour, _, shard = item["pk"]["S"].partition("#")
    moment, _, digest = item["sk"]["S"].partition("#")
    return {
        **moved_item(item, move),
        "pk": {"S": f"{_later_hour(hour, move.seconds)}#{shard}"},
        "sk": {"S": f"{int(moment) + move.seconds * 1_000:013d}#{digest}"},
    }


def moved_payloads(objects: Mapping[str, bytes], move: Move) -> tuple[dict[str, bytes], dict[str, str]]:
    """Move the headers of payloads among `objects`; returns all objects, and the new digest of each old one."""
    moved, digests = dict(objects), {}
    for key, content in objects.items():
        if move.whole and content.startswith(_MAGIC):
            end = 8 + int.from_bytes(content[4:8], "big")
            header = content[8:end]
            later, count = _CREATED_AT.subn(lambda found: b"%010d" % (int(found[0]) + move.seconds), header)
            assert (count, len(later)) == (1, len(header)), key
            moved[key] = content[:8] + later + content[end:]
            digests[_digest(header)] = _digest(later)
    return moved, digests


def with_digests(text: str, digests: Mapping[str, str]) -> str:
    """Replace the digests of headers in any text: 64 hexadecimal digits are nothing else by chance."""
    for old, new in digests.items():
        text = text.replace(old, new)
    return text


def with_etas(text: str, move: Move) -> str:
    """Move when messages are due, in the text of a file."""
    if not move.whole:
        return text
    change = timedelta(seconds=move.seconds)
    return _ETA.sub(lambda found: (datetime.fromisoformat(found[0]) + change).isoformat(), text)


def fresh_command(text: str, now: float) -> str:
    """Let a command to workers expire half a minute from now."""
    message = json.loads(text)
    message["headers"]["expires"] = now + 30
    return json.dumps(message)


def _later(value: dict[str, str], change: int) -> dict[str, str]:
    return {"N": str(int(value["N"]) + change)}


def _later_hour(hour: str, seconds: int) -> str:
    moment = calendar.timegm(time.strptime(hour, "%Y-%m-%dT%H"))
    return time.strftime("%Y-%m-%dT%H", time.gmtime(moment + seconds))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
