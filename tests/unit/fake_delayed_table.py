"""An in-memory table of delayed messages."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

from mdstore.aws.dynamodb.attributes import Item, from_item
from mdstore.errors import ConditionFailed, MdstoreError
from tests.unit.fakes import MemoryDynamo, meets

START = 1_795_618_800.0  # 2026-11-25T15:00:00Z


class Clock:
    """A clock that only the test moves."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class MemoryTable(MemoryDynamo):
    """Answers the delayed table's calls from memory, and queries in pages of `page` items.

    A call named in `failing` raises its error. A batch of deletes leaves its first `unprocessed` items. `after_read` is called
    once, after the next read of the state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.page = 1_000
        self.failing: dict[str, MdstoreError] = {}
        self.unprocessed = 0
        self.after_read: Callable[[], Any] | None = None
        self._lock = threading.RLock()

    @property
    def state(self) -> dict[str, Any]:
        return from_item(self.items["due", "drain", "drain"])

    @property
    def messages(self) -> list[Item]:
        return [item for item in self.items.values() if "body" in item]

    def call(self, operation: str, body: Mapping[str, Any] | bytes, *, deadline: float | None = None) -> Any:
        with self._lock:
            if operation in self.failing:
                raise self.failing[operation]
            answer = super().call(operation, body, deadline=deadline)
        if operation == "GetItem" and self.after_read is not None:
            after_read, self.after_read = self.after_read, None
            after_read()
        return answer

    def _query(self, body: Mapping[str, Any]) -> Any:
        assert body["ConsistentRead"]
        table, values = body["TableName"], body["ExpressionAttributeValues"]
        after = body.get("ExclusiveStartKey", {"sk": {"S": ""}})["sk"]["S"]
        found = [
            self.items[place]
            for place in sorted(self.items)
            if place[:2] == (table, values[":pk"]["S"]) and after < place[2] < values[":now"]["S"]
        ]
        answer: dict[str, Any] = {"Items": copy.deepcopy(found[: self.page])}
        if len(found) > self.page:
            last = found[self.page - 1]
            answer["LastEvaluatedKey"] = {"pk": last["pk"], "sk": last["sk"]}
        return answer

    def _getitem(self, body: Mapping[str, Any]) -> Any:
        assert body["ConsistentRead"]
        return super()._getitem(body)

    def _updateitem(self, body: Mapping[str, Any]) -> Any:
        place = (body["TableName"], body["Key"]["pk"]["S"], body["Key"]["sk"]["S"])
        item = self.items[place]
        if not meets(body, item):
            raise ConditionFailed("UpdateItem: the conditional request failed")
        for change in body["UpdateExpression"].removeprefix("SET ").split(", "):
            name, _, value = change.partition(" = ")
            item[body["ExpressionAttributeNames"][name]] = body["ExpressionAttributeValues"][value]
        return {"Attributes": copy.deepcopy(item)}

    def _batchwriteitem(self, body: Mapping[str, Any]) -> Any:
        ((table, requests),) = body["RequestItems"].items()
        assert 1 <= len(requests) <= 25
        left, self.unprocessed = requests[: self.unprocessed], 0
        for request in requests[len(left) :]:
            key = request["DeleteRequest"]["Key"]
            self.items.pop((table, key["pk"]["S"], key["sk"]["S"]), None)
        return {"UnprocessedItems": {table: left} if left else {}}
