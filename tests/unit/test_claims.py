"""The claim check: large messages come back as they were, and no pointer leads anywhere else."""

from __future__ import annotations

import base64
import json
from datetime import date
from typing import Any

import pytest
import zstandard

from mdstore.compression import compress
from mdstore.errors import InvalidRequest, Unavailable, Untrusted
from mdstore.model import CLAIM_DAYS, MAX_AGE
from mdstore.queue.claims import Claims, is_claim, read_claim
from mdstore.queue.envelope import Malformed, check
from mdstore.settings import DAY
from tests.unit.fakes import MemoryObjects

NOON = 1_795_608_000.0  # 2026-11-25T12:00:00Z


def message(arguments: Any, task: str = "shop.report", task_id: str = "t1") -> str:
    """A task's message as kombu sends it."""
    return json.dumps({
        "body": base64.b64encode(json.dumps([arguments, {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": task_id, "retries": 0, "eta": None},
        "properties": {"body_encoding": "base64", "delivery_tag": "d1"},
    })  # fmt: skip


LARGE = message(["é" * 20_000])


class Site:
    """A bucket and the time."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()
        self.now = NOON
        self.claims = Claims(
            objects=self.objects, prefix="claims/", threshold=2_000, max_bytes=2**20, clock=lambda: self.now
        )

    def pointer(self, text: str = LARGE) -> dict[str, Any]:
        pointer: dict[str, Any] = json.loads(self.claims.check_in(text))
        return pointer


@pytest.fixture
def site() -> Site:
    return Site()


def test_a_small_message_goes_as_it_is(site: Site) -> None:
    """Up to the threshold, in bytes, nothing is stored."""
    text = "é" * 1_000
    assert site.claims.check_in(text) == text
    assert not site.objects.stored
    assert is_claim(site.claims.check_in(text + "x"))


def test_a_large_message_comes_back_as_it_was(site: Site) -> None:
    """The pointer is small and no task's message; it names the task for people and logs."""
    text = site.claims.check_in(LARGE)
    assert len(text) < 400
    assert is_claim(text)
    with pytest.raises(Malformed):
        check(text)
    assert site.claims.redeem(text) == LARGE
    claim = read_claim(text)
    assert (claim.task, claim.id, claim.size) == ("shop.report", "t1", len(LARGE.encode()))
    (key,) = site.objects.stored
    assert key == f"claims/45/2026-11-25/{claim.digest[:2]}/{claim.digest}"
    assert len(site.objects.stored[key]) < len(LARGE) / 2


@pytest.mark.parametrize("text", ["x" * 5_000, "[" * 5_000, json.dumps({"headers": {"task": 7, "id": "x" * 3_000}})])
def test_what_is_no_task_is_kept_too(site: Site, text: str) -> None:
    """Reading the names of a message is no check of it."""
    pointer = site.claims.check_in(text)
    assert site.claims.redeem(pointer) == text
    assert (read_claim(pointer).task, read_claim(pointer).id) == ("", "")


def test_long_names_do_not_make_a_pointer_large(site: Site) -> None:
    """They are cut; the message has them whole."""
    text = site.claims.check_in(message(["x"], task="\U0001f600" * 5_000, task_id="\U0001f600" * 5_000))
    assert is_claim(text)
    assert len(text.encode()) < 3_000
    assert site.claims.redeem(text)


def test_the_same_message_is_stored_once_a_day(site: Site) -> None:
    """An object must outlive each message that points to it, so it is not shared with one of another day."""
    first = site.claims.check_in(LARGE)
    assert site.claims.check_in(LARGE) == first
    assert len(site.objects.stored) == 1
    site.now += DAY
    second = site.claims.check_in(LARGE)
    assert len(site.objects.stored) == 2
    assert site.claims.redeem(first) == site.claims.redeem(second) == LARGE


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
def test_what_is_due_late_is_kept_longer(site: Site, ahead: float | None, days: int) -> None:
    """Until it is due, and then through queue and dead letters."""
    text = site.claims.check_in(LARGE, due=None if ahead is None else NOON + ahead)
    assert read_claim(text).days == days
    assert site.claims.redeem(text) == LARGE
    assert days * DAY - max(0, ahead or 0) >= 2 * MAX_AGE


def test_too_large_a_message_is_refused(site: Site) -> None:
    """What no worker would read must not be sent."""
    with pytest.raises(InvalidRequest, match=r"message: expected at most max_claim_bytes=1048576, got '1048577 bytes'"):
        site.claims.check_in("x" * (2**20 + 1))
    assert not site.objects.stored


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
def test_what_is_no_pointer(text: str) -> None:
    """A message whose arguments speak of claims is a message."""
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
def test_a_pointer_that_is_wrong_is_untrusted(site: Site, changes: dict[str, Any]) -> None:
    """It is seen as a pointer, refused with a reason, and nothing is asked of S3."""
    text = json.dumps({**site.pointer(), **changes})
    assert is_claim(text)
    with pytest.raises(Untrusted, match=r"not a claim|outside of its bounds"):
        site.claims.redeem(text)
    assert not site.objects.gets


@pytest.mark.parametrize("name", ["digest", "size", "days", "stored"])
def test_a_pointer_that_lacks_something_is_untrusted(site: Site, name: str) -> None:
    """Nothing of it has a default that leads somewhere."""
    pointer = site.pointer()
    del pointer[name]
    with pytest.raises(Untrusted, match=name):
        site.claims.redeem(json.dumps(pointer))


@pytest.mark.parametrize(
    "changes", [{"digest": "0" * 64}, {"stored": "2026-11-24"}, {"days": 400}, {"size": 100}, {"size": 2**20}], ids=str
)
def test_a_pointer_to_something_else_is_untrusted(site: Site, changes: dict[str, Any]) -> None:
    """What is not there, and what is there but not as said; each under the prefix and nowhere else."""
    pointer = {**site.pointer(), **changes}
    with pytest.raises(Untrusted, match="cannot be read"):
        site.claims.redeem(json.dumps(pointer))
    assert all(key.startswith("claims/") and ".." not in key for key, _, _ in site.objects.gets)


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
def test_an_object_that_was_replaced_is_untrusted(site: Site, content: bytes, reason: str) -> None:
    """Whoever may write to the bucket decides nothing but that the message is dead-lettered."""
    text = site.claims.check_in(LARGE)
    (key,) = site.objects.stored
    site.objects.stored[key] = content
    with pytest.raises(Untrusted, match=reason):
        site.claims.redeem(text)


def test_what_is_not_text_is_untrusted(site: Site) -> None:
    """A forger may store bytes under their right digest."""
    content = b"\xff" * 3_000
    digest = site.claims._contents.put(site.claims._place(45, date(2026, 11, 25)), content)
    with pytest.raises(Untrusted, match="not text"):
        site.claims.redeem(json.dumps({**site.pointer(), "digest": digest, "size": len(content)}))


def test_that_s3_is_not_there_is_no_fault_of_the_pointer(site: Site) -> None:
    """The message is to be tried again, not dead-lettered."""
    text = site.claims.check_in(LARGE)

    class Absent(MemoryObjects):
        def get(self, key: str, start: int, end: int) -> bytes:  # noqa: ARG002
            raise Unavailable(f"S3 get {key!r}", code="SlowDown")

    claims = Claims(objects=Absent(), prefix="claims/", threshold=2_000, max_bytes=2**20)
    with pytest.raises(Unavailable):
        claims.redeem(text)


def test_lives_are_in_order_and_cover_the_table() -> None:
    """The longest covers what the due-time table takes, ten years ahead."""
    assert list(CLAIM_DAYS) == sorted(CLAIM_DAYS)
    assert CLAIM_DAYS[0] * DAY >= 3 * MAX_AGE
    assert CLAIM_DAYS[-1] >= 10 * 366 + 2 * 14
