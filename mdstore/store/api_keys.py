"""API keys: who may call the front door, and as which source.

A key is shown once, when it is made. The ledger table keeps its SHA-256 only:

    pk = api-key#{sha256, hex}    sk = key    source, scopes, created_at (Unix milliseconds)

A request id has no `#`, so no request can take that place. The item has no `expires_at`: a key is good until it is revoked.
A key has 256 random bits, so a plain digest is enough where a password would need a slow one.
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
#: Seconds that a found key is believed without another look, and so the time until a revoked one ends everywhere.
BELIEVED = 60.0
_REMEMBERED = 1_024
#: Anything else is refused without a look into the table.
_FORM = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")


class Scope(StrEnum):
    """What a key allows."""

    WRITE = "write"  # submit requests
    READ = "read"  # records, and requests of the key's own source
    OPERATE = "operate"  # requests of every source


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a key stands for. Requests made with it have its `source`."""

    source: str
    scopes: frozenset[Scope]


class ApiKeys:
    """Makes, finds and revokes keys. Safe to share between threads."""

    def __init__(self, *, dynamo: DynamoClient, table: str, clock: Callable[[], float] = time.time) -> None:
        self._dynamo = dynamo
        self._table = table
        self._clock = clock
        self._lock = threading.Lock()
        self._found: OrderedDict[str, tuple[float, ApiKey]] = OrderedDict()

    def create(self, *, source: str, scopes: Iterable[Scope | str]) -> str:
        """Make a key and return it; it cannot be read again. Raises `InvalidRequest`."""
        check_source(source)
        allowed = sorted(_checked(scopes))
        key = PREFIX + secrets.token_urlsafe(32)
        values = {"source": source, "scopes": allowed, "created_at": round(self._clock() * 1000)}
        # Without a condition: a try whose answer was lost may be repeated, and 256 random bits do not meet again.
        self._dynamo.call("PutItem", {"TableName": self._table, "Item": to_item({**_place(_digest(key)), **values})})
        return key

    def find(self, key: str) -> ApiKey | None:
        """What `key` stands for, or None. What was found is believed for a minute; what was not is looked up again."""
        if not _FORM.fullmatch(key):
            return None
        digest = _digest(key)
        return self._remembered(digest) or self._look_up(digest)

    def revoke(self, key: str) -> bool:
        """End a key: here at once, in other processes within a minute. Returns whether there was one."""
        digest = _digest(key)
        body = {"TableName": self._table, "Key": to_item(_place(digest)), "ReturnValues": "ALL_OLD"}
        answer = self._dynamo.call("DeleteItem", body)
        with self._lock:
            self._found.pop(digest, None)
        return bool(answer.get("Attributes"))

    def _remembered(self, digest: str) -> ApiKey | None:
        with self._lock:
            since, found = self._found.get(digest, (0.0, None))
            # A clock that was set back must not prolong what is believed.
            return found if 0 <= self._clock() - since < BELIEVED else None

    def _look_up(self, digest: str) -> ApiKey | None:
        body = {"TableName": self._table, "Key": to_item(_place(digest)), "ConsistentRead": True}
        asked_at = self._clock()
        item = self._dynamo.call("GetItem", body).get("Item")
        if item is None:
            return None
        values = from_item(item)
        found = ApiKey(source=values["source"], scopes=frozenset(map(Scope, values["scopes"])))
        with self._lock:
            self._found[digest] = asked_at, found
            self._found.move_to_end(digest)
            while len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)
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


def _place(digest: str) -> dict[str, str]:
    return {"pk": f"api-key#{digest}", "sk": "key"}
