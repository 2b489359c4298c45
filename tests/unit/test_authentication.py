"""Signatures of messages: what passes, what does not, and which keys are used."""

from __future__ import annotations

import hmac
import json
from typing import Any

import pytest

from mdstore.errors import ConfigurationError, Unavailable
from mdstore.queue.broker.authentication import Authenticator, FixedKeys, SecretKeys, Unauthenticated, unsigned
from mdstore.settings import load_settings

OLD, NEW = "old" * 11, "new" * 11
TEXT = json.dumps({"body": "[]", "headers": {"id": "1"}})


def made(*keys: str, required: bool = True) -> Authenticator:
    return Authenticator(FixedKeys(keys), required=required)


def test_a_signed_message_is_json_and_verifies_to_what_was_signed() -> None:
    signed = made(NEW).sign(TEXT, "q")
    assert json.loads(signed) == {**json.loads(TEXT), "mdstore-mac": signed[-68:-2]}
    assert made(NEW).verify(signed, "q", sent_at=0) == unsigned(signed) == TEXT


def test_any_change_is_refused() -> None:
    """Every character of body, headers and signature counts, and so does the queue."""
    signed = made(NEW).sign(TEXT, "q")
    for place in range(len(signed)):
        other = "0" if signed[place] != "0" else "1"
        with pytest.raises(Unauthenticated):
            made(NEW).verify(f"{signed[:place]}{other}{signed[place + 1 :]}", "q", sent_at=0)
    for text, queue, key in ((signed, "p", NEW), (signed, "q", OLD), (signed + " ", "q", NEW), (TEXT, "q", NEW)):
        with pytest.raises(Unauthenticated):
            made(key).verify(text, queue, sent_at=0)


def test_a_rotation_has_two_keys() -> None:
    """The first one signs; both are accepted."""
    assert made(NEW, OLD).sign(TEXT, "q") == made(NEW).sign(TEXT, "q")
    for key in (NEW, OLD):
        assert made(NEW, OLD).verify(made(key).sign(TEXT, "q"), "q", sent_at=0) == TEXT


def test_unsigned_messages_pass_while_signatures_are_not_required() -> None:
    assert made(NEW, required=False).verify(TEXT, "q", sent_at=0) == TEXT
    with pytest.raises(Unauthenticated, match="not signed with a key of this app"):
        made(NEW, required=False).verify(made(OLD).sign(TEXT, "q"), "q", sent_at=0)


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    original = hmac.compare_digest
    compared: list[Any] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr("mdstore.queue.broker.authentication.hmac.compare_digest", compare)
    made(NEW).verify(made(NEW).sign(TEXT, "q"), "q", sent_at=0)
    assert len(compared) == 1


class Secret:
    """A secret in Secrets Manager, and the clock by which it is fetched."""

    def __init__(self) -> None:
        self.versions: tuple[str, ...] = (OLD,)
        self.fetched = 0
        self.now = 1_000.0
        self.is_reachable = True
        self.keys = SecretKeys(self._fetch, clock=lambda: self.now)

    def _fetch(self) -> tuple[str, ...]:
        self.fetched += 1
        if not self.is_reachable:
            raise Unavailable("no answer", code="Timeout")
        return self.versions


def test_a_rotated_secret_is_fetched_when_a_message_needs_it() -> None:
    """A worker that knows only the old key fetches the new one. Until it may, the message waits: it is not refused."""
    secret = Secret()
    authenticator = Authenticator(secret.keys, required=True)
    old = authenticator.sign(TEXT, "q")
    secret.versions = (NEW, OLD)
    new = made(NEW).sign(TEXT, "q")
    with pytest.raises(Unavailable, match="newer"):
        authenticator.verify(new, "q", sent_at=secret.now)
    assert secret.fetched == 1
    secret.now += 60
    assert authenticator.verify(new, "q", sent_at=secret.now - 60) == TEXT
    assert authenticator.verify(old, "q", sent_at=secret.now - 60) == TEXT
    assert secret.fetched == 2


def test_forged_messages_make_a_worker_fetch_the_secret_once_a_minute() -> None:
    """Each is refused once the keys were fetched after it was sent, and waits until then."""
    secret = Secret()
    authenticator = Authenticator(secret.keys, required=True)
    forged, sent_at = made("forged" * 6).sign(TEXT, "q"), secret.now
    for _ in range(3):
        with pytest.raises(Unavailable):
            authenticator.verify(forged, "q", sent_at=sent_at)
    assert secret.fetched == 1
    secret.now += 300
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            authenticator.verify(forged, "q", sent_at=sent_at)
    assert secret.fetched == 2


def test_no_message_is_refused_while_the_secret_cannot_be_fetched() -> None:
    secret = Secret()
    authenticator = Authenticator(secret.keys, required=True)
    old = authenticator.sign(TEXT, "q")
    secret.is_reachable = False
    secret.now += 100
    with pytest.raises(Unavailable):
        authenticator.verify(made(NEW).sign(TEXT, "q"), "q", sent_at=secret.now)
    assert authenticator.verify(old, "q", sent_at=secret.now) == TEXT


def test_a_sender_looks_for_a_new_key_once_an_hour_and_outlives_an_outage() -> None:
    secret = Secret()
    authenticator = Authenticator(secret.keys, required=True)
    secret.is_reachable = False
    with pytest.raises(Unavailable):
        authenticator.sign(TEXT, "q")
    secret.is_reachable = True
    assert authenticator.sign(TEXT, "q") == made(OLD).sign(TEXT, "q")
    secret.versions, secret.is_reachable = (NEW, OLD), False
    secret.now += 3_600
    assert authenticator.sign(TEXT, "q") == made(OLD).sign(TEXT, "q")
    secret.is_reachable = True
    secret.now += 3_600
    assert authenticator.sign(TEXT, "q") == made(NEW).sign(TEXT, "q")


def test_the_settings_take_two_long_keys_or_a_secret_and_show_neither() -> None:
    loaded = load_settings({"MDSTORE_SIGNING_KEYS": f"{NEW}, {OLD}"})
    assert loaded.settings.signing_keys == (NEW, OLD)
    assert ("signing_keys", "********", "MDSTORE_SIGNING_KEYS") in loaded.rows()
    assert NEW not in repr(loaded)
    for wrong in ("short", f"{NEW},{OLD},{NEW}", f"{NEW},short"):
        with pytest.raises(ConfigurationError, match="signing_keys") as raised:
            load_settings({"MDSTORE_SIGNING_KEYS": wrong})
        assert wrong not in str(raised.value)
        assert "short" not in str(raised.value.value)
    with pytest.raises(ConfigurationError, match="signing_secret"):
        load_settings({"MDSTORE_SIGNING_KEYS": NEW, "MDSTORE_SIGNING_SECRET": "mdstore/key"})
