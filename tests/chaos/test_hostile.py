"""Hostile messages and payloads are dead-lettered and never executed, and the worker survives within its memory.

These tests use a real worker and a real queue. `tests/integration/test_queue.py` has simpler cases, and
`tests/unit/test_payload.py` has the same forged payloads without a worker.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import zstandard

from mdstore import exactjson
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import SCHEMA_VERSION, Reference, State
from mdstore.store.partitioning import MAX_LANE_OPERATIONS
from mdstore.store.payload import MAGIC, Header, Section
from tests.chaos.target import EVIL, Target, attacked, upserts
from tests.waiting import until

MEGABYTE = 2**20
LANE_LIMIT = 64 * MEGABYTE  # the setting `max_lane_bytes`
Message = dict[str, Any]


@pytest.fixture
def target(aws: EmbeddedAws, tmp_path: Path) -> Iterator[Target]:
    """Yield a worker to attack; after the test its processes must be the same, within their memory, and executing messages."""
    with attacked(aws.url, tmp_path / "worker.log") as made:
        before = made.processes()
        yield made
        made.check_alive(before)


# -- messages


def refuse(target: Target, cases: list[tuple[str, Any]]) -> None:
    """Send each message as an `ingest`; assert that each is dead-lettered with a reason that contains the given text."""
    for _, message in cases:
        target.send("mdstore.ingest", message)
    letters = target.wait_for_letters(len(cases))
    reasons = {_text(json.loads(letter["body"]).get("message")): letter.get("reason", "") for letter in letters}
    assert {_text(message): reason for reason, message in cases if reason not in reasons.get(_text(message), "")} == {}
    assert len(letters) == len(cases)
    assert {letter["task"] for letter in letters} == {"mdstore.ingest"}


def _text(message: Any) -> str:
    return json.dumps(message, sort_keys=True)


def test_a_message_with_a_false_reference_is_dead_lettered(target: Target) -> None:
    """A payload of another request or outside its own key is never executed, even if the object is a valid payload."""
    evil = target.store("evil", EVIL, 3)
    body = target.client.store.objects.get(evil.payload, 0, 2**20)
    for key in ("blobs/evil", "other/evil", "payloads/evil2", "evil"):
        target.put(key, body)
    elsewhere = (
        "blobs/evil", "other/evil", "evil", "/payloads/evil", "payloads/../payloads/evil", "payloads//evil",
        f"../{target.client.settings.bucket}/payloads/evil", "payloads/evil?versionId=1", "payloads/%65vil", "",
    )  # fmt: skip
    misnamed = ("../evil", "a/../evil", "", "x" * 201, "a\nb", "ev\u0131l")
    changes = [("is not the key of request", {"payload": payload}) for payload in elsewhere]
    changes += [("is not the key of request", {"request_id": "other"})]
    changes += [("expected 1-200 of A-Z", {"request_id": name, "payload": f"payloads/{name}"}) for name in misnamed]
    changes += [
        ("belongs to another request than the message", {"request_id": "evil2", "payload": "payloads/evil2"}),
        ("belongs to another request than the message", {"source": "somebody"}),
        ("does not have the digest that the message says", {"digest": evil.digest.upper()}),
    ]

    refuse(target, [(reason, msgspec.to_builtins(evil) | lie) for reason, lie in changes])

    assert target.client.status("evil").state is State.ACCEPTED
    assert target.client.store.ledger.receipts("evil", 0) == {}


def test_a_message_of_another_schema_is_dead_lettered(target: Target) -> None:
    """A wrong schema version, missing or unknown fields, fields of other types, and values that are no message are refused."""
    evil: Message = msgspec.to_builtins(target.store("evil", EVIL, 3))
    cases: list[tuple[str, Any]] = [
        (f"schema version {v}", evil | {"v": v}) for v in (SCHEMA_VERSION + 1, 99, 0, -1, 2**62)
    ]
    cases += [(f"not {SCHEMA_VERSION - 1}", evil | {"v": SCHEMA_VERSION - 1})]
    cases += [("Expected `int`", evil | {"v": v}) for v in ("1", 1.5, None, [1])]
    cases += [(f"missing required field `{name}`", {n: v for n, v in evil.items() if n != name}) for name in evil]
    cases += [(f"unknown field `{name}`", evil | {name: "os.system"}) for name in ("x", "__class__")]
    cases += [("Expected `str`", evil | {name: 7}) for name in ("request_id", "payload", "digest", "source")]
    cases += [("Expected `int`", evil | {"lanes": lanes}) for lanes in ("1", None)]
    cases += [("belongs to another request than the message", evil | {"lanes": lanes}) for lanes in (0, -1, 2**62)]
    cases += [("Expected `object`", message) for message in (None, 7, "text", [], [evil])]

    refuse(target, cases)

    assert target.client.status("evil").state is State.ACCEPTED


INVALID_LANES: dict[str, Any] = {
    "too large": 99, "one too many": 3, "negative": -1, "huge": 2**62, "a number's text": "0", "text": "a", "half": 0.5,
    "nothing": None, "list": [0], "object": {"lane": 0},
}  # fmt: skip


def test_an_invalid_lane_is_dead_lettered(target: Target) -> None:
    """An `apply_lane` with a lane out of range, or not a number, does not fail the request that it names, which completes."""
    good = target.store("lanes", "good", 250)
    assert good.lanes == 3
    for lane in INVALID_LANES.values():
        target.send("mdstore.apply_lane", msgspec.to_builtins(good), lane)

    letters = target.wait_for_letters(len(INVALID_LANES))

    assert [letter["body"][:200] for letter in letters if "lane" not in letter.get("reason", "")] == []
    assert target.client.status("lanes").state is State.ACCEPTED
    target.send("mdstore.ingest", msgspec.to_builtins(good))
    until(lambda: target.client.status("lanes").state is State.COMPLETED, what="the request is completed")
    assert target.client.status("lanes").counts.applied == {"upsert": 250}


# -- payloads


LINE = b'{"index":0,"op":"upsert","entity":"evil","key":"k","attribute":{"M":{}}}\n'


def digest_of(data: bytes) -> str:
    """Return the SHA-256 in the form in which a header has it."""
    return hashlib.sha256(data).hexdigest()


def bomb(megabytes: int, filling: bytes) -> bytes:
    """Return about `megabytes` megabytes of `filling`, compressed to a few kilobytes."""
    zstd = zstandard.ZstdCompressor().compressobj()
    piece = filling * (MEGABYTE // len(filling))
    return b"".join(zstd.compress(piece) for _ in range(megabytes)) + zstd.flush()


def nested(size: int) -> bytes:
    """Return `size` bytes of JSON, nested as deeply as possible."""
    return b"[" * (size // 2) + b"]" * (size // 2)


def forged(
    data: bytes, *, raw: int, count: int, head: dict[str, Any] | None = None, **changes: Any
) -> tuple[bytes, bytes]:
    """Return header and body of a payload with true digests whose only lane is `data`; `changes` are to its section."""
    nothing = zstandard.ZstdCompressor().compress(b"")
    fields: dict[str, Any] = {"offset": 0, "length": len(data), "raw": raw, "count": count, "digest": digest_of(data)}
    header = Header(
        v=1, codec="zstd", request_id="", source="default", content="", created_at=int(time.time()), operations=count,
        lanes=(Section(**(fields | changes)),), refused_counts={},
        refused=Section(offset=len(data), length=len(nothing), raw=0, count=0, digest=digest_of(nothing)),
    )  # fmt: skip
    return exactjson.dumps(msgspec.structs.replace(header, **(head or {}))), data + nothing


def packed(*lines: bytes) -> tuple[bytes, int]:
    """Return the compressed lines, and their size before compression."""
    text = b"".join(lines)
    return zstandard.ZstdCompressor().compress(text), len(text)


def bombs() -> dict[str, tuple[str, bytes, bytes]]:
    """Return the expected reason, header and body, by name, of payloads that are bombs or whose header is false."""
    honest, size = packed(LINE * 3)
    deep, deep_size = packed(LINE.replace(b'{"M":{}}', nested(10 * MEGABYTE)))
    deeper, deeper_size = packed(nested(10 * MEGABYTE) + b"\n")
    gigabyte, empty = bomb(1024, LINE), bomb(64, b"\n")
    little = len(gigabyte)
    return {
        "says-little": (f"not {little} bytes when decompressed", *forged(gigabyte, raw=little, count=10)),
        "says-too-little": ("claims more bytes than its 1000 can take", *forged(gigabyte, raw=1000, count=10)),
        "says-too-many": ("claims 200001 operations", *forged(gigabyte, raw=LANE_LIMIT, count=MAX_LANE_OPERATIONS + 1)),
        "says-all": ("claims 1073741824 bytes", *forged(gigabyte, raw=2**30, count=MAX_LANE_OPERATIONS)),
        "says-the-most": ("when decompressed", *forged(gigabyte, raw=LANE_LIMIT, count=MAX_LANE_OPERATIONS)),
        "says-less-than-nothing": ("cannot be decoded", *forged(gigabyte, raw=-2, count=0)),
        "empty-lines": ("does not hold what its header says", *forged(empty, raw=LANE_LIMIT, count=MAX_LANE_OPERATIONS)),
        "deep": ("cannot be decoded", *forged(deep, raw=deep_size, count=1)),
        "deeper": ("cannot be decoded", *forged(deeper, raw=deeper_size, count=1)),
        "before": ("cannot be decoded", *forged(honest, raw=size, count=3, offset=-10)),
        "behind": ("cannot be decoded", *forged(honest, raw=size, count=3, offset=2**62)),
        "negative": ("cannot be decoded", *forged(honest, raw=size, count=3, length=-5)),
        "longer": ("cannot be decoded", *forged(honest, raw=size, count=3, length=2**62)),
        "fewer-lines": ("cannot be decoded", *forged(honest, raw=size, count=-3)),
        "old": ("too old", *forged(honest, raw=size, count=3, head={"created_at": 0})),
        "of-another-version": ("schema version", *forged(honest, raw=size, count=3, head={"v": 99})),
    }  # fmt: skip


def test_a_bomb_or_a_payload_with_a_false_header_is_dead_lettered(target: Target) -> None:
    """Neither lanes of 1 GB in a few kilobytes, whatever size they claim, nor 10 MB of nested JSON harm the worker."""
    cases: list[tuple[str, Any]] = []
    for name, (reason, nameless, body) in bombs().items():
        head = exactjson.dumps(json.loads(nameless) | {"request_id": name})
        target.put(f"payloads/{name}", MAGIC + len(head).to_bytes(4, "big") + head + body)
        cases.append((reason, msgspec.to_builtins(reference(name, head))))

    refuse(target, cases)


def reference(name: str, head: bytes) -> Reference:
    """Return a reference with the digest of `head`."""
    return Reference(
        v=1, request_id=name, payload=f"payloads/{name}", digest=digest_of(head), lanes=1, source="default"
    )


def test_an_object_that_is_not_a_payload_is_dead_lettered(target: Target) -> None:
    """An object under a payload's key is refused if it does not begin like a payload, or does and has a bad header."""
    magic, most = MAGIC, (2**32 - 1).to_bytes(4, "big")
    deep, other = nested(10 * MEGABYTE), b'{"v":1}'
    objects = {
        "empty": ("is not a payload", b""),
        "text": ("is not a payload", b"hello"),
        "magic": ("cannot be decoded", magic),
        "other-magic": ("is not a payload", b"MDS2" + b"\0" * 100),
        "zeros": ("is not a payload", b"\0" * MEGABYTE),
        "large-header": ("is not a payload", magic + most + b"{" * 1_000),
        "absent-header": ("cannot be decoded", magic + (60 * MEGABYTE).to_bytes(4, "big") + b"{}"),
        "deep-header": ("cannot be decoded", magic + len(deep).to_bytes(4, "big") + deep),
        "deep-lanes": ("cannot be decoded", magic + (len(deep) + 10).to_bytes(4, "big") + b'{"lanes":' + deep + b"}"),
        "other-header": ("cannot be decoded", magic + len(other).to_bytes(4, "big") + other),
    }  # fmt: skip
    for name, (_, body) in objects.items():
        target.put(f"payloads/{name}", body)

    refuse(target, [(reason, msgspec.to_builtins(reference(name, b""))) for name, (reason, _) in objects.items()])


# -- envelopes


def envelope(content: Any, *, headers: Message | None = None, **changes: Any) -> str:
    """Return a message as kombu sends it, with `content` (bytes, or encoded as JSON); in `changes` a `_` stands for a `-`."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    message = {
        "body": base64.b64encode(content).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "mdstore.ingest", "id": str(uuid4()), "lang": "py", **(headers or {})},
        "properties": {"delivery_info": {}, "body_encoding": "base64", "delivery_tag": "tag"},
    }
    return json.dumps(message | {name.replace("_", "-"): value for name, value in changes.items()})


def arguments(message: Message, **embedded: Any) -> list[Any]:
    """Return the body of a task with one argument."""
    return [[message], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **embedded}]


def undecodable(evil: Message) -> dict[str, str]:
    """Return envelopes that must not be executed although the reference in them is valid."""
    good, deep = arguments(evil), nested(600_000)
    properties = {"delivery_info": {}, "delivery_tag": "tag"}
    bombed = zlib.compress(b" " * 384 * MEGABYTE)
    return {
        "scalar": "7",
        "null": "null",
        "list": "[]",
        "deep message": nested(1_000_000).decode(),
        "deep body": envelope(deep),
        "deep arguments": envelope(b"[[" + deep + b"],{},{}]"),
        "deep headers": envelope(good).replace('"lang": "py"', '"x": ' + nested(900_000).decode()),
        "yaml": envelope(b"- [1]\n- {}\n- {}\n", content_type="application/x-yaml"),
        "msgpack": envelope(b"\x93\x90\x80\x80", content_type="application/x-msgpack"),
        "text": envelope(good, content_type="text/plain"),
        "unknown type": envelope(good, content_type="application/x-evil"),
        "not base64": envelope(good, body="%%%"),
        "number for a body": envelope(good, body=7),
        "unknown body encoding": envelope(good, properties={**properties, "body_encoding": "rot13"}),
        "bomb": envelope(bombed, headers={"compression": "gzip"}),
        "body is null": envelope(None),
        "body is a number": envelope(7),
        "body is two": envelope([1, 2]),
        "arguments are a number": envelope([7, {}, {}]),
        "arguments are too many": envelope([[evil, 0, 0], {}, {}]),
        "names are a list": envelope([[evil], [1], {}]),
        "task is a list": envelope(good, headers={"task": ["mdstore.ingest"]}),
        "task is a number": envelope(good, headers={"task": 7}),
        "unknown task": envelope(good, headers={"task": "mdstore.evil"}),
        "half a character": envelope(good, headers={"task": "mdstore.\ud800"}),
        "huge name": envelope(good, headers={"task": "x" * 900_000}),
        "many headers": envelope(good, headers={"task": "evil", **{f"h{n}": n for n in range(50_000)}}),
    }


#: Headers without meaning, or that only an attacker sends.
ODD_HEADERS: dict[str, Message] = {
    "compression without any": {"compression": "bzip2"},
    "id is a number": {"id": 7},
    "id is an object": {"id": {"a": 1}},
    "id is half a character": {"id": "\ud800"},
    "id is longer than a key": {"id": "x" * 5_000},
    "time limits are text": {"timelimit": ["a", "b"]},
    "time limits are a number": {"timelimit": 7},
    "time limits are no time": {"timelimit": [0.001, 0.001]},
    "retries are text": {"retries": "a"},
    "eta is no time": {"eta": "tomorrow"},
    "eta is never": {"eta": "2999-01-01T00:00:00+00:00"},
    "expires is no time": {"expires": "yesterday"},
    "expires is past": {"expires": "2001-01-01T00:00:00+00:00"},
    "receives are text": {"receives": "a"},
    "receives are many": {"receives": 10**9},
    "group is a list": {"group": [1], "group_index": "a"},
    "stamps are a number": {"stamps": 7, "stamped_headers": 7},
    "huge": {"origin": "x" * 800_000, "argsrepr": 7, "shadow": ["a"]},
}


def test_an_invalid_envelope_is_dead_lettered(target: Target) -> None:
    """Text that is not a Celery message, and messages that are nested, compressed, huge or not JSON, are never executed."""
    cases = undecodable(msgspec.to_builtins(target.store("evil", EVIL, 3)))
    for text in cases.values():
        target.send_raw(text)

    letters = target.wait_for_letters(len(cases))

    bodies = [letter["body"] for letter in letters]
    assert [name for name, text in cases.items() if text not in bodies] == []
    assert target.client.status("evil").state is State.ACCEPTED


def test_odd_headers_do_no_harm(target: Target) -> None:
    """Whatever its headers, a message is checked by its reference or dead-lettered unread, and none vanishes."""
    evil: Message = msgspec.to_builtins(target.store("evil", EVIL, 3))
    # Each has a false source, so none may be executed, and the source tells them apart.
    texts = {
        name: envelope(arguments(evil | {"source": name}), headers=headers) for name, headers in ODD_HEADERS.items()
    }
    texts["encoding"] = envelope(arguments(evil | {"source": "encoding"}), content_encoding="evil-8")
    texts["callbacks"] = envelope(arguments(evil | {"source": "callbacks"}, callbacks="a", chord="b", chain=7))
    for text in texts.values():
        target.send_raw(text)

    letters = target.wait_for_letters(len(texts))

    sources = {text: name for name, text in texts.items()}
    found = [sources.get(letter["body"]) or json.loads(letter["body"])["message"]["source"] for letter in letters]
    assert sorted(found) == sorted(texts)
    reasons = [letter["reason"] for letter in letters if letter["body"] not in sources]
    assert [reason for reason in reasons if "belongs to another request than the message" not in reason] == []


def test_an_expired_message_cannot_block_another(target: Target) -> None:
    """A forged, expired message with the task id of a request does not prevent that request from being executed."""
    evil: Message = msgspec.to_builtins(target.store("evil", EVIL, 3)) | {"source": "expired"}
    target.send_raw(envelope(arguments(evil), headers={"id": "victim", "expires": "2001-01-01T00:00:00+00:00"}))
    target.wait_until_empty()

    victim = target.client.submit(upserts(3, "good"), request_id="victim").wait(timeout=30).status()

    assert victim.state is State.COMPLETED
