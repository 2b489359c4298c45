"""Keep the large messages of tasks in S3, and send small pointers to them through SQS: the claim check pattern.

    {"mdstore-claim": 1, "digest": SHA-256 of the message, "size": its bytes, "days": 45, "stored": "2026-11-25",
     "task": ..., "id": ...}
    {claim_prefix}45/2026-11-25/9f/9f86d081...        the message as it would have been sent, compressed with zstd

A pointer cannot pass for a task's message, because it has neither body nor headers. Its `task` and `id` are only for people and
logs; the stored message decides what is executed and how it is routed. Anyone who may send to the queue may send any pointer,
so a pointer names no S3 key: the key is built from its digest, its day and one of the lifetimes in `CLAIM_DAYS`.

An object is not deleted when its message is done, because other messages may have the same content. The bucket's lifecycle
rules (`mdstore provision`) delete objects by age. The same content is stored again on another day, so no object is more than a
day older than its message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

import msgspec

from mdstore.aws.blobs import Contents
from mdstore.aws.s3 import Objects
from mdstore.errors import IntegrityError, InvalidRequest
from mdstore.model import CLAIM_DAYS
from mdstore.queue.broker import ascii_json
from mdstore.settings import DAY

_MARK = "mdstore-claim"
_MAX_POINTER = 4_096  # characters
#: The most characters of a name that a pointer keeps, if the name is ASCII and if not: an escape takes up to 12 characters.
_MAX_ASCII_NAME, _MAX_NAME = 255, 100

Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Points to a stored message. Its object is kept for at least `days`, counted from the day `stored` (UTC)."""

    version: Literal[1] = msgspec.field(name=_MARK)
    digest: Digest
    size: int
    days: int
    stored: date
    task: str = ""
    id: str = ""


class _Marked(msgspec.Struct):
    mark: msgspec.Raw | msgspec.UnsetType = msgspec.field(name=_MARK, default=msgspec.UNSET)


class _Names(msgspec.Struct):
    task: str = ""
    id: str = ""


class _Message(msgspec.Struct):
    headers: _Names = msgspec.field(default_factory=_Names)


_claim = msgspec.json.Decoder(Claim)
_marked = msgspec.json.Decoder(_Marked)
_message = ascii_json.Decoder[_Message](_Message)


class ClaimChecks:
    """Stores large messages and loads them again. `threshold` and `max_bytes` are the size of a message in UTF-8.

    Both methods also raise `Unavailable` and `DeploymentBroken`.
    """

    def __init__(
        self,
        *,
        objects: Objects,
        prefix: str,
        threshold: int,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._contents = Contents(objects=objects, max_bytes=max_bytes)
        self._prefix = prefix
        self._threshold = threshold
        self._max_bytes = max_bytes
        self._clock = clock

    def store(self, text: str, *, due: float | None = None) -> str:
        """Return `text` or, if it is larger than the threshold, store it in S3 and return a pointer to it.

        A message that is `due` later (Unix seconds) is kept at least that much longer. Raises `InvalidRequest`
        over `max_bytes`.
        """
        content = text.encode()
        if len(content) <= self._threshold:
            return text
        if len(content) > self._max_bytes:
            expected = f"at most max_claim_bytes={self._max_bytes}"
            raise InvalidRequest(field="message", value=f"{len(content)} bytes", expected=expected)
        now = self._clock()
        days, stored = _lifetime(0.0 if due is None else due - now), datetime.fromtimestamp(now, UTC).date()
        claim = Claim(
            version=1,
            digest=self._contents.put(self._place(days, stored), content),
            size=len(content),
            days=days,
            stored=stored,
            **_names(text),
        )
        return ascii_json.dumps(claim)

    def load(self, text: str) -> str:
        """Return the message that a pointer names. Raises `IntegrityError` if it is missing or not what was stored."""
        claim = read_claim(text)
        content = self._contents.get(self._place(claim.days, claim.stored), claim.digest, claim.size)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"claim {claim.digest!r} is not text: {error}") from error

    def _place(self, days: int, stored: date) -> str:
        return f"{self._prefix}{days}/{stored}/"


def is_claim(text: str) -> bool:
    """Return whether `text` looks like a pointer rather than a task's message; `load` checks whether it is valid."""
    if len(text) > _MAX_POINTER or _MARK not in text:
        return False
    try:
        return _marked.decode(text).mark is not msgspec.UNSET
    except (ValueError, RecursionError):
        return False


def read_claim(text: str) -> Claim:
    """Decode a pointer. Its `task` and `id` are only for logs. Raises `IntegrityError`."""
    try:
        claim = _claim.decode(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not a claim: {error}") from error
    if claim.days not in CLAIM_DAYS:
        raise IntegrityError(f"not a claim: days={claim.days}, expected one of {CLAIM_DAYS}")
    return claim


def _lifetime(ahead: float) -> int:
    """Return for how many days to keep a message that is due in `ahead` seconds and may then be queued and dead-lettered."""
    needed = CLAIM_DAYS[0] + (ahead / DAY if ahead > DAY else 0)
    return next((days for days in CLAIM_DAYS if days >= needed), CLAIM_DAYS[-1])


def _names(text: str) -> dict[str, Any]:
    try:
        headers = _message.decode(text).headers
    except (ValueError, RecursionError):
        return {}
    named = {"task": headers.task, "id": headers.id}
    return {key: name[: _MAX_ASCII_NAME if name.isascii() else _MAX_NAME] for key, name in named.items()}
