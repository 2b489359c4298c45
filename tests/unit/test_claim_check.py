"""The claim check: large messages are read back unchanged, and no pointer leads anywhere else."""

from __future__ import annotations

import base64
import json
from datetime import date
from typing import Any

import pytest
import zstandard

from mdstore.compression import compress
from mdstore.errors import IntegrityError, InvalidRequest, Unavailable
from mdstore.model import CLAIM_DAYS, MAX_AGE
from mdstore.queue.broker.claim_check import ClaimChecks, is_claim, read_claim
from mdstore.queue.broker.envelope import Malformed, check
from mdstore.settings import DAY
from tests.unit.fakes import MemoryObjects

NOON = 1_795_608_000.0  # 2026-11-25T12:00:00Z


def message(arguments: Any, task: str = "shop.report", task_id: str = "t1") -> str:
    """Return a task's message as kombu sends it."""
    return json.dumps({
        "body": base64.b64encode(json.dumps([arguments, {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": task_id, "retries": 0, "eta": None},
        "properties": {"body_encoding": "base64", "delivery_tag": "d1"},
    })  # fmt: skip


LARGE = message(["é" * 20_000])


class Environment:
    """Holds a bucket, a clock and the claim checks that use them."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()
        self.now = NOON
        self.claim_checks = ClaimChecks(
            objects=self.objects, prefix="claims/", threshold=2_000, max_bytes=2**20, clock=lambda: self.now
        )

    def pointer(self, text: str = LARGE) -> dict[str, Any]:
        pointer: dict[str, Any] = json.loads(self.claim_checks.store(text))
        return pointer


@pytest.fixture
def environment() -> Environment:
    return Environment()


def test_a_small_message_is_sent_unchanged(environment: Environment) -> None:
    """Nothing is stored for a message of up to the threshold, in bytes."""
    text = "é" * 1_000
    assert environment.claim_checks.store(text) == text
    assert not environment.objects.stored
    assert is_claim(environment.claim_checks.store(text + "x"))


def test_a_large_message_is_read_back_unchanged(environment: Environment) -> None:
    """The pointer is small and is not a task's message; it names the task for people and logs."""
    text = environment.claim_checks.store(LARGE)
    assert len(text) < 400
    assert is_claim(text)
    with pytest.raises(Malformed):
        check(text)
    assert environment.claim_checks.load(text) == LARGE
    claim = read_claim(text)
    assert (claim.task, claim.id, claim.size) == ("shop.report", "t1", len(LARGE.encode()))
    (key,) = environment.objects.stored
    assert key == f"claims/45/2026-11-25/{claim.digest[:2]}/{claim.digest}"
    assert len(environment.objects.stored[key]) < len(LARGE) / 2


@pytest.mark.parametrize("text", ["x" * 5_000, "[" * 5_000, json.dumps({"headers": {"task": 7, "id": "x" * 3_000}})])
def test_text_that_is_not_a_task_is_stored_too(environment: Environment, text: str) -> None:
    """Reading a message's task name and id does not validate the message."""
    pointer = environment.claim_checks.store(text)
    assert environment.claim_checks.load(pointer) == text
    assert (read_claim(pointer).task, read_claim(pointer).id) == ("", "")


def test_long_names_do_not_make_a_pointer_large(environment: Environment) -> None:
    """The pointer truncates the names; the stored message has them in full."""
    text = environment.claim_checks.store(message(["x"], task="\U0001f600" * 5_000, task_id="\U0001f600" * 5_000))
    assert is_claim(text)
    assert len(text.encode()) < 3_000
    assert environment.claim_checks.load(text)


def test_the_same_message_is_stored_once_a_day(environment: Environment) -> None:
    """An object must outlive every message that points to it, so messages of different days do not share one."""
    first = environment.claim_checks.store(LARGE)
    assert environment.claim_checks.store(LARGE) == first
    assert len(environment.objects.stored) == 1
    environment.now += DAY
    second = environment.claim_checks.store(LARGE)
    assert len(environment.objects.stored) == 2
    assert environment.claim_checks.load(first) == environment.claim_checks.load(second) == LARGE


@pytest.mark.parametrize(
    ("ahead", "days"),
    [
        (None, 45),
        (-DAY, 45),
        (0, 45),
        (900, 45),
        (2 * DAY, 400),
        (355 * DAY, 400),
        (356 * DAY, 3_720),
        (10 * 366 * DAY, 3_720),
    ],
)
def test_messages_with_a_late_due_time_are_kept_longer(
    environment: Environment, ahead: float | None, days: int
) -> None:
    """The object is kept until the message is due, and then for its time in the queue and in the dead-letter queue."""
    text = environment.claim_checks.store(LARGE, due=None if ahead is None else NOON + ahead)
    assert read_claim(text).days == days
    assert environment.claim_checks.load(text) == LARGE
    assert days * DAY - max(0, ahead or 0) >= 2 * MAX_AGE


def test_a_message_over_the_limit_is_refused(environment: Environment) -> None:
    """A message that no worker would read must not be sent."""
    with pytest.raises(InvalidRequest, match=r"message: expected at most max_claim_bytes=1048576, got '1048577 bytes'"):
        environment.claim_checks.store("x" * (2**20 + 1))
    assert not environment.objects.stored


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        '"mdstore-claim"',
        '["mdstore-claim"]',
        message(["mdstore-claim"]),
        json.dumps({"body": '{"mdstore-claim": 1}', "headers": {"mdstore-claim": 1}}),
        "[" * 4_000 + '"mdstore-claim"',
        json.dumps({"mdstore-claim": 1, "padding": "x" * 5_000}),
    ],
    ids=lambda text: text[:30],
)
def test_messages_that_only_mention_claims_are_not_pointers(text: str) -> None:
    """A message whose arguments mention claims is a normal message."""
    assert not is_claim(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"mdstore-claim": 2},
        {"mdstore-claim": "1"},
        {"mdstore-claim": None},
        {"digest": "0" * 63},
        {"digest": "../" * 21 + "x"},
        {"digest": "A" * 64},
        {"digest": "0" * 64 + "\n"},
        {"digest": 7},
        {"size": "100"},
        {"size": 1.5},
        {"size": -1},
        {"size": 2**20 + 1},
        {"size": 10**30},
        {"days": 44},
        {"days": "45"},
        {"days": "../../payloads"},
        {"stored": "../payloads"},
        {"stored": "2026-11-25/../.."},
        {"stored": "2026-02-30"},
        {"stored": 20261125},
        {"task": 7},
        {"id": None},
        {"key": "payloads/r1"},
        {"prefix": "payloads/"},
        {"digest": None},
    ],
    ids=str,
)
def test_an_invalid_pointer_is_rejected(environment: Environment, changes: dict[str, Any]) -> None:
    """It is recognised as a pointer and refused with a reason; nothing is read from S3."""
    text = json.dumps({**environment.pointer(), **changes})
    assert is_claim(text)
    with pytest.raises(IntegrityError, match=r"not a claim|outside of its bounds"):
        environment.claim_checks.load(text)
    assert not environment.objects.gets


@pytest.mark.parametrize("name", ["digest", "size", "days", "stored"])
def test_an_incomplete_pointer_is_rejected(environment: Environment, name: str) -> None:
    """No field has a default that could lead to another object."""
    pointer = environment.pointer()
    del pointer[name]
    with pytest.raises(IntegrityError, match=name):
        environment.claim_checks.load(json.dumps(pointer))


@pytest.mark.parametrize(
    "changes", [{"digest": "0" * 64}, {"stored": "2026-11-24"}, {"days": 400}, {"size": 100}, {"size": 2**20}], ids=str
)
def test_a_pointer_to_another_object_is_rejected(environment: Environment, changes: dict[str, Any]) -> None:
    """The object is missing, or its content is not what the pointer says. Only objects under the prefix are read."""
    pointer = {**environment.pointer(), **changes}
    with pytest.raises(IntegrityError, match="cannot be read"):
        environment.claim_checks.load(json.dumps(pointer))
    assert all(key.startswith("claims/") and ".." not in key for key, _, _ in environment.objects.gets)


def bomb() -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(b"0" * 2**28)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"not zstd", "not zstd"),
        (compress(LARGE.encode()[:-1]), "bytes when decompressed"),
        (compress(LARGE.encode()[:-1] + b" "), "does not have its digest"),
        (bomb(), "bytes when decompressed"),
    ],
    ids=["empty", "noise", "short", "changed", "bomb"],
)
def test_a_replaced_object_is_rejected(environment: Environment, content: bytes, reason: str) -> None:
    """Somebody who may write to the bucket can only cause the message to be dead-lettered."""
    text = environment.claim_checks.store(LARGE)
    (key,) = environment.objects.stored
    environment.objects.stored[key] = content
    with pytest.raises(IntegrityError, match=reason):
        environment.claim_checks.load(text)


def test_an_object_that_is_not_text_is_rejected(environment: Environment) -> None:
    """A forger may store bytes under their correct digest."""
    content = b"\xff" * 3_000
    digest = environment.claim_checks._contents.put(environment.claim_checks._place(45, date(2026, 11, 25)), content)
    with pytest.raises(IntegrityError, match="not text"):
        environment.claim_checks.load(json.dumps({**environment.pointer(), "digest": digest, "size": len(content)}))


def test_an_unavailable_s3_does_not_make_a_pointer_invalid(environment: Environment) -> None:
    """The message must be retried, not dead-lettered."""
    text = environment.claim_checks.store(LARGE)

    class Absent(MemoryObjects):
        def get(self, key: str, start: int, end: int) -> bytes:  # noqa: ARG002
            raise Unavailable(f"S3 get {key!r}", code="SlowDown")

    claim_checks = ClaimChecks(objects=Absent(), prefix="claims/", threshold=2_000, max_bytes=2**20)
    with pytest.raises(Unavailable):
        claim_checks.load(text)


def test_retention_periods_ascend_and_cover_the_delayed_table() -> None:
    """The longest one covers messages that the delayed table holds for ten years."""
    assert list(CLAIM_DAYS) == sorted(CLAIM_DAYS)
    assert CLAIM_DAYS[0] * DAY >= 3 * MAX_AGE
    assert CLAIM_DAYS[-1] >= 10 * 366 + 2 * 14
