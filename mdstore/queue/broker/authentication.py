"""Signed messages: a worker that has a key executes only what was sent by a process that has the key.

    {"body": ..., "headers": ..., "properties": ..., "mdstore-mac": "1:9f86d081..."}

The text before the last field, with a closing brace, is the message as it would have been sent without a key: a task's
message, a command, or a pointer to a message in S3, whose digest is thereby signed too. The MAC (HMAC-SHA256) covers this text,
byte for byte, and the name of its queue or topic. So a signature is valid for no other message and no other queue.
"""

from __future__ import annotations

import hmac
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mdstore.errors import DeploymentBroken, Unavailable
from mdstore.log import event
from mdstore.queue.broker.envelope import Malformed

_FIELD = ',"mdstore-mac":"1:'
_SIGNATURE = re.compile(re.escape(_FIELD) + r'([0-9a-f]{64})"}')
_LENGTH = len(_FIELD) + 64 + len('"}')
#: Seconds after which keys are fetched from Secrets Manager again.
_REFRESH = 3_600.0
#: The least seconds between two fetches because of unknown signatures, which forged messages have too.
_FORCED_REFRESH = 60.0
#: Seconds by which the clocks of SQS and of this machine may differ.
_CLOCK_TOLERANCE = 60.0


class Unauthenticated(Malformed):
    """The message does not prove that its sender has a key. Nothing in it may be trusted."""


class Keys(Protocol):
    """Provides the keys: the first one signs, and messages signed with any of them are accepted."""

    def get(self, *, as_of: float | None = None) -> tuple[bytes, ...]:
        """Return the keys; with `as_of`, in Unix seconds, all that existed at that time.

        Raises `Unavailable` or `DeploymentBroken`.
        """


class FixedKeys:
    """Provides the keys of the settings."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def get(self, *, as_of: float | None = None) -> tuple[bytes, ...]:  # noqa: ARG002
        """Return the keys."""
        return self._keys


class SecretKeys:
    """Provides the keys of a secret that may be rotated at any time. `fetch` returns its current key, and the previous one."""

    def __init__(self, fetch: Callable[[], tuple[str, ...]], *, clock: Callable[[], float] = time.time) -> None:
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: tuple[bytes, ...] = ()
        self._tried_at = self._fetched_at = 0.0

    def get(self, *, as_of: float | None = None) -> tuple[bytes, ...]:
        """Return the keys. Without `as_of`, if they cannot be fetched again, return those that were known."""
        with self._lock:
            now = self._clock()
            if not self._keys or now - self._tried_at >= (_REFRESH if as_of is None else _FORCED_REFRESH):
                self._tried_at = now
                try:
                    self._keys = tuple(key.encode() for key in self._fetch())
                except (Unavailable, DeploymentBroken) as error:
                    if not self._keys:
                        raise
                    event("signing_keys.kept", error=str(error))
                else:
                    self._fetched_at = now
                    return self._keys
            if as_of is not None and self._fetched_at < as_of + _CLOCK_TOLERANCE:
                raise Unavailable(
                    "the message may be signed with a key that is newer than those known here", code="OldKeys"
                )
            return self._keys


class Authenticator:
    """Signs and verifies messages. Threads may share it. If signatures are not `required`, unsigned messages pass."""

    def __init__(self, keys: Keys, *, required: bool) -> None:
        self._keys = keys
        self._required = required

    def sign(self, text: str, destination: str) -> str:
        """Return a message, which is a JSON object, with a signature. Raises `Unavailable` or `DeploymentBroken`."""
        return f'{text[:-1]}{_FIELD}{_mac(self._keys.get()[0], text, destination)}"}}'

    def verify(self, text: str, destination: str, *, sent_at: float) -> str:
        """Return a message without its signature; `sent_at` is when SQS got it, in Unix seconds.

        Raises `Unauthenticated`, `DeploymentBroken`, or `Unavailable` if a key that is not known here yet may have signed it.
        """
        found = _SIGNATURE.fullmatch(text, max(0, len(text) - _LENGTH))
        if found is None:
            if self._required:
                raise Unauthenticated("the message is not signed")
            return text
        plain = text[: found.start()] + "}"
        for as_of in (None, sent_at):
            for key in self._keys.get(as_of=as_of):
                if hmac.compare_digest(_mac(key, plain, destination), found[1]):
                    return plain
        raise Unauthenticated(f"the message is not signed with a key of this app for {destination!r}")


def unsigned(text: str) -> str:
    """Return a message without its signature, which is not verified."""
    found = _SIGNATURE.fullmatch(text, max(0, len(text) - _LENGTH))
    return text if found is None else text[: found.start()] + "}"


def _mac(key: bytes, text: str, destination: str) -> str:
    # Text from another sender may hold anything; what this package signs is ASCII.
    return hmac.digest(key, f"{destination}\n{text}".encode(errors="surrogatepass"), "sha256").hex()
