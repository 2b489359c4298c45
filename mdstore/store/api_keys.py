"""API keys decide who may call the HTTP API, and as which source.

A key is shown once, when it is created. The ledger table stores only its SHA-256:

    pk = api-key#{sha256, hex}    sk = key    source, scopes, created_at (Unix milliseconds)

Request ids contain no `#`, so no request can have the same primary key. The item has no `expires_at`: a key is valid until it
is revoked. A key has 256 random bits, so a plain digest is enough; a password would need a slow one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec

from mdstore.aws.dynamodb.attributes import from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.errors import InvalidRequest
from mdstore.model import check_source

PREFIX = "mds_"
#: Seconds that a process caches a key, which is also the longest time that a revoked key still works.
CACHE_SECONDS = 60.0
_CACHE_SIZE = 1_024
#: Keys of another form are rejected without a table lookup.
_KEY_FORM = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")


class Scope(StrEnum):
    """A permission of a key."""

    WRITE = "write"  # submit requests
    READ = "read"  # read records, and requests of the key's own source
    OPERATE = "operate"  # act on requests of every source


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """The source and the permissions of a key. Requests made with the key get its `source`."""

    source: str
    scopes: frozenset[Scope]


class ApiKeys:
    """Creates, finds and revokes keys. Threads may share it."""

    def __init__(self, *, dynamo: DynamoClient, table: str, clock: Callable[[], float] = time.time) -> None:
        self._dynamo = dynamo
        self._table = table
        self._clock = clock
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, tuple[float, ApiKey]] = OrderedDict()

    def create(self, *, source: str, scopes: Iterable[Scope | str]) -> str:
        """Create a key and return it; it cannot be read again later. Raises `InvalidRequest`."""
        check_source(source)
        allowed = sorted(_checked(scopes))
        key = PREFIX + secrets.token_urlsafe(32)
        values = {"source": source, "scopes": allowed, "created_at": round(self._clock() * 1000)}
        # No condition is needed: a retry after a lost response writes the same item, and 256 random bits do not collide.
        self._dynamo.call(
            "PutItem", {"TableName": self._table, "Item": to_item({**_primary_key(_digest(key)), **values})}
        )
        return key

    def find(self, key: str) -> ApiKey | None:
        """Return the source and permissions of `key`, or None. A found key is cached for a minute, an unknown one is not."""
        if not _KEY_FORM.fullmatch(key):
            return None
        return self.cached(key) or self._look_up(_digest(key))

    def cached(self, key: str) -> ApiKey | None:
        """Return what `find` returns, if that is known without a call to AWS."""
        with self._lock:
            since, found = self._cache.get(_digest(key), (0.0, None))
            # Setting the clock back must not extend the cache time.
            return found if 0 <= self._clock() - since < CACHE_SECONDS else None

    def revoke(self, key: str) -> bool:
        """Revoke a key: at once in this process, within a minute in others. Return whether the key existed."""
        digest = _digest(key)
        body = {"TableName": self._table, "Key": to_item(_primary_key(digest)), "ReturnValues": "ALL_OLD"}
        answer = self._dynamo.call("DeleteItem", body)
        with self._lock:
            self._cache.pop(digest, None)
        return bool(answer.get("Attributes"))

    def _look_up(self, digest: str) -> ApiKey | None:
        body = {"TableName": self._table, "Key": to_item(_primary_key(digest)), "ConsistentRead": True}
        asked_at = self._clock()
        item = self._dynamo.call("GetItem", body).get("Item")
        if item is None:
            return None
        values = from_item(item)
        found = ApiKey(source=values["source"], scopes=frozenset(map(Scope, values["scopes"])))
        with self._lock:
            self._cache[digest] = asked_at, found
            self._cache.move_to_end(digest)
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return found


def _checked(scopes: Iterable[Scope | str]) -> frozenset[Scope]:
    given = list(scopes)
    try:
        checked = frozenset(map(Scope, given))
    except ValueError:
        checked = frozenset()
    if not checked:
        raise InvalidRequest(field="scopes", value=given, expected=f"some of {', '.join(Scope)}")
    return checked


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _primary_key(digest: str) -> dict[str, str]:
    return {"pk": f"api-key#{digest}", "sk": "key"}
