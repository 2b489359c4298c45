"""API keys over an in-memory table: what is stored, and for how long a looked-up key is cached."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import pytest

from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.errors import InvalidRequest
from mdstore.store.api_keys import CACHE_SECONDS, ApiKey, ApiKeys, Scope


class Table:
    """A table that answers three calls, and counts its reads."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.reads = 0

    def call(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if operation == "PutItem":
            self.items[body["Item"]["pk"]["S"]] = body["Item"]
            return {}
        place = body["Key"]["pk"]["S"]
        if operation == "DeleteItem":
            found = self.items.pop(place, None)
            return {"Attributes": found} if found else {}
        assert operation == "GetItem"
        assert body["ConsistentRead"] is True
        self.reads += 1
        return {"Item": self.items[place]} if place in self.items else {}


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(table: Table, clock: Clock) -> ApiKeys:
    return keys_of(table, clock)


def keys_of(table: Table, clock: Clock) -> ApiKeys:
    return ApiKeys(dynamo=cast(DynamoClient, table), table="ledger", clock=clock)


def test_only_the_digest_of_a_key_is_stored(keys: ApiKeys, table: Table) -> None:
    """The item holds the key's SHA-256, source, scopes and creation time, but never the key; it has no expiry time."""
    key = keys.create(source="erp", scopes=["write", Scope.READ])
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert table.items == {
        f"api-key#{digest}": {
            "pk": {"S": f"api-key#{digest}"},
            "sk": {"S": "key"},
            "source": {"S": "erp"},
            "scopes": {"L": [{"S": "read"}, {"S": "write"}]},
            "created_at": {"N": "1800000000000"},
        }
    }
    assert key.startswith("mds_")
    assert key not in str(table.items)


def test_a_key_is_found_with_its_source_and_scopes(keys: ApiKeys) -> None:
    """`find` returns the source and scopes that `create` was given; two keys differ."""
    one, other = keys.create(source="erp", scopes=["write"]), keys.create(source="crm", scopes=["read", "operate"])
    assert keys.find(one) == ApiKey(source="erp", scopes=frozenset({Scope.WRITE}))
    assert keys.find(other) == ApiKey(source="crm", scopes=frozenset({Scope.READ, Scope.OPERATE}))


def test_a_found_key_is_cached_for_a_minute(keys: ApiKeys, table: Table, clock: Clock) -> None:
    """A found key is read from the table again only after a minute."""
    key = keys.create(source="erp", scopes=["read"])
    assert keys.find(key)
    clock.now += CACHE_SECONDS - 0.001
    assert keys.find(key)
    assert table.reads == 1
    clock.now += 0.001
    assert keys.find(key)
    assert table.reads == 2


def test_setting_the_clock_back_does_not_prolong_caching(keys: ApiKeys, table: Table, clock: Clock) -> None:
    """A key that was cached at a time in the future is read again."""
    key = keys.create(source="erp", scopes=["read"])
    keys.find(key)
    table.items.clear()
    clock.now -= 3_600
    assert keys.find(key) is None


def test_an_unknown_key_is_not_cached(keys: ApiKeys, table: Table, clock: Clock) -> None:
    """A key that is created after it was refused is valid at once."""
    key = keys_of(Table(), clock).create(source="erp", scopes=["read"])
    assert keys.find(key) is None
    table.items[f"api-key#{hashlib.sha256(key.encode()).hexdigest()}"] = {
        "source": {"S": "erp"},
        "scopes": {"L": [{"S": "read"}]},
    }
    assert keys.find(key)


def test_a_revoked_key_ends_here_at_once_and_in_other_processes_within_a_minute(
    keys: ApiKeys, table: Table, clock: Clock
) -> None:
    """Another process accepts a revoked key until its cache entry expires, a minute after it was read."""
    elsewhere = keys_of(table, clock)
    key = keys.create(source="erp", scopes=["read"])
    assert keys.find(key)
    assert elsewhere.find(key)
    assert keys.revoke(key) is True
    assert keys.find(key) is None
    assert elsewhere.find(key)
    clock.now += CACHE_SECONDS
    assert elsewhere.find(key) is None
    assert keys.revoke(key) is False


def test_the_cache_of_keys_is_bounded(keys: ApiKeys, table: Table) -> None:
    """The cache holds 1,024 keys; beyond that, the key that was read longest ago is dropped and read again."""
    made = [keys.create(source="erp", scopes=["read"]) for _ in range(1_025)]
    assert all(keys.find(key) for key in made)
    assert table.reads == 1_025
    keys.find(made[-1])
    assert table.reads == 1_025
    keys.find(made[0])
    assert table.reads == 1_026


@pytest.mark.parametrize(
    "text", ["", "mds_", "mds_" + "a" * 42, "mds_" + "a" * 44, "x" * 47, "mds_" + "a" * 43 + "\n", "\ud800"]
)
def test_text_without_the_form_of_a_key_is_not_looked_up(keys: ApiKeys, table: Table, text: str) -> None:
    """Text that cannot be a key is refused without a read."""
    assert keys.find(text) is None
    assert table.reads == 0


@pytest.mark.parametrize("scopes", [[], ["admin"], ["read", "admin"]])
def test_create_checks_the_scopes(keys: ApiKeys, table: Table, scopes: list[str]) -> None:
    """A key with no scope, or with an unknown scope, is not created."""
    with pytest.raises(InvalidRequest, match="scopes: expected some of write, read, operate"):
        keys.create(source="erp", scopes=scopes)
    assert not table.items


def test_create_checks_the_source(keys: ApiKeys, table: Table) -> None:
    """A source that cannot begin a request id is refused."""
    with pytest.raises(InvalidRequest, match="source"):
        keys.create(source="erp:1", scopes=["read"])
    assert not table.items
