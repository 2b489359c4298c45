"""DynamoDB in memory. Operations are named as in its API, and take and return its JSON."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.memory_aws.expressions import Item, condition, update

_TYPE = "com.amazonaws.dynamodb.v20120810#"
_PAGE = 2**20  # bytes that a query or scan reads per page
_TOKENS = 600.0  # seconds for which a transaction's token is remembered
_NONE = {"Code": "None"}
_FAILED_CHECK = "The conditional request failed"


class ApiError(Exception):
    """An error response: its code, its message, and further members of its body."""

    def __init__(self, code: str, message: str, **members: Any) -> None:
        super().__init__(code, message)
        self.body = {"__type": _TYPE + code, "message": message, **members}


@dataclass
class _Table:
    """The items of a table by partition key and sort key; "" is the sort key of a table that has none."""

    keys: tuple[str, ...]
    description: dict[str, Any]
    indexes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    items: dict[str, dict[str, Item]] = field(default_factory=lambda: defaultdict(dict))
    indexed: dict[str, dict[str, dict[tuple[str, str], Item]]] = field(default_factory=dict)
    ttl: str = ""

    def place(self, item: Mapping[str, Any]) -> tuple[str, str]:
        """Return the key of an item."""
        try:
            return item[self.keys[0]]["S"], item[self.keys[1]]["S"] if len(self.keys) > 1 else ""
        except KeyError:
            raise ApiError(
                "ValidationException", "One or more parameter values were invalid: Missing the key"
            ) from None

    def get(self, place: tuple[str, str]) -> Item | None:
        """Return an item."""
        return self.items[place[0]].get(place[1]) if place[0] in self.items else None

    def put(self, place: tuple[str, str], item: Item | None) -> None:
        """Replace an item, or remove it with None."""
        old = self.get(place)
        if item is not None:
            self.items[place[0]][place[1]] = item
        elif old is not None:
            del self.items[place[0]][place[1]]
        for name, keys in self.indexes.items():
            entries = self.indexed[name]
            if old is not None and all(key in old for key in keys):
                entries[old[keys[0]]["S"]].pop(place, None)
            if item is not None and all(key in item for key in keys):
                entries[item[keys[0]]["S"]][place] = item

    def add_index(self, definition: Mapping[str, Any]) -> None:
        """Index the items by other attributes."""
        name = definition["IndexName"]
        self.indexes[name] = tuple(key["AttributeName"] for key in definition["KeySchema"])
        self.indexed[name] = defaultdict(dict)
        self.description.setdefault("GlobalSecondaryIndexes", []).append({"IndexStatus": "ACTIVE", **definition})


class DynamoDb:
    """All tables. `write_units` counts what the writes would cost: one unit per KB, and two in a transaction."""

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}
        self._tokens: dict[str, float] = {}
        self.write_units = 0

    def call(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make a call. Raises `ApiError`."""
        found = getattr(self, f"_{operation.lower()}", None)
        if found is None:
            raise ApiError("UnknownOperationException", f"{operation} is not supported")
        answer: dict[str, Any] = found(body)
        return answer

    # -- items

    def _getitem(self, body: dict[str, Any]) -> dict[str, Any]:
        table = self._table(body)
        item = table.get(table.place(body["Key"]))
        return {"Item": item} if item is not None else {}

    def _batchgetitem(self, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, list[Item]] = {}
        for name, asked in body["RequestItems"].items():
            table = self._tables[name]
            items = (table.get(table.place(key)) for key in asked["Keys"])
            found[name] = [item for item in items if item is not None]
        return {"Responses": found, "UnprocessedKeys": {}}

    def _putitem(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._written(body, "Put")

    def _updateitem(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._written(body, "Update")

    def _deleteitem(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._written(body, "Delete")

    def _written(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        table = self._table(body)
        place = table.place(body["Item"] if kind == "Put" else body["Key"])
        old = table.get(place)
        if not _holds(body, old):
            returned = {"Item": old} if old and body.get("ReturnValuesOnConditionCheckFailure") == "ALL_OLD" else {}
            raise ApiError("ConditionalCheckFailedException", _FAILED_CHECK, **returned)
        new = _after(kind, body, old)
        table.put(place, new)
        self.write_units += _units(old, new)
        match body.get("ReturnValues"):
            case "ALL_NEW":
                return {"Attributes": new}
            case "ALL_OLD":
                return {"Attributes": old} if old is not None else {}
        return {}

    def _batchwriteitem(self, body: dict[str, Any]) -> dict[str, Any]:
        for name, requests in body["RequestItems"].items():
            for request in requests:
                ((kind, write),) = request.items()
                self._written({"TableName": name, **write}, kind.removesuffix("Request"))
        return {"UnprocessedItems": {}}

    def _transactwriteitems(self, body: dict[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        token = body.get("ClientRequestToken")
        if token is not None:
            if now - self._tokens.get(token, -_TOKENS) < _TOKENS:
                return {}
            if len(self._tokens) > 100_000:
                self._tokens = {one: at for one, at in self._tokens.items() if now - at < _TOKENS}
        writes: list[tuple[_Table, tuple[str, str], Item | None, Item | None]] = []
        reasons: list[dict[str, Any]] = []
        places = set()
        for action in body["TransactItems"]:
            ((kind, write),) = action.items()
            table = self._table(write)
            place = table.place(write["Item"] if kind == "Put" else write["Key"])
            places.add((write["TableName"], place))
            old = table.get(place)
            if _holds(write, old):
                reasons.append(_NONE)
                if kind != "ConditionCheck":
                    writes.append((table, place, old, _after(kind, write, old)))
            else:
                returned = (
                    {"Item": old} if old and write.get("ReturnValuesOnConditionCheckFailure") == "ALL_OLD" else {}
                )
                reasons.append({"Code": "ConditionalCheckFailed", "Message": _FAILED_CHECK, **returned})
        if len(places) != len(reasons):
            raise ApiError("ValidationException", "Transaction request cannot include multiple operations on one item")
        if any(reason is not _NONE for reason in reasons):
            codes = ", ".join(reason["Code"] for reason in reasons)
            message = f"Transaction cancelled, please refer cancellation reasons for specific reasons [{codes}]"
            raise ApiError("TransactionCanceledException", message, CancellationReasons=reasons)
        for table, place, old, new in writes:
            table.put(place, new)
            self.write_units += 2 * _units(old, new)
        if token is not None:
            self._tokens[token] = now
        return {}

    def _query(self, body: dict[str, Any]) -> dict[str, Any]:
        table, index = self._table(body), body.get("IndexName")
        keys = table.indexes[index] if index else table.keys
        meets = condition(body["KeyConditionExpression"], tuple(body.get("ExpressionAttributeNames", {}).items()))
        values = body.get("ExpressionAttributeValues", {})
        partitions = table.indexed[index] if index else table.items
        # Of the values, the one that some partition has as its key is the partition key's: there is no other equality.
        found = [
            item
            for value in values.values()
            for item in partitions.get(value.get("S", ""), {}).values()
            if meets(item, values)
        ]
        found.sort(
            key=lambda item: [item[key]["S"] for key in keys[1:]], reverse=not body.get("ScanIndexForward", True)
        )
        return _page(body, table, found)

    def _scan(self, body: dict[str, Any]) -> dict[str, Any]:
        table = self._table(body)
        return _page(body, table, [item for items in table.items.values() for item in items.values()])

    # -- tables

    def _table(self, body: Mapping[str, Any]) -> _Table:
        try:
            return self._tables[body["TableName"]]
        except KeyError:
            raise ApiError("ResourceNotFoundException", f"there is no table {body.get('TableName')}") from None

    def _createtable(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["TableName"]
        if name in self._tables:
            raise ApiError("ResourceInUseException", f"there is a table {name}")
        indexes = body.pop("GlobalSecondaryIndexes", [])
        arn = f"arn:aws:dynamodb:us-east-1:000000000000:table/{name}"
        keys = tuple(key["AttributeName"] for key in body["KeySchema"])
        table = _Table(keys=keys, description={**body, "TableStatus": "ACTIVE", "TableArn": arn})
        for index in indexes:
            table.add_index(index)
        self._tables[name] = table
        return {"TableDescription": table.description}

    def _describetable(self, body: dict[str, Any]) -> dict[str, Any]:
        table = self._table(body)
        return {"Table": {**table.description, "ItemCount": sum(map(len, table.items.values()))}}

    def _updatetable(self, body: dict[str, Any]) -> dict[str, Any]:
        table = self._table(body)
        for change in body.get("GlobalSecondaryIndexUpdates", []):
            table.add_index(change["Create"])
        return {"TableDescription": table.description}

    def _deletetable(self, body: dict[str, Any]) -> dict[str, Any]:
        description = self._table(body).description
        del self._tables[body["TableName"]]
        return {"TableDescription": description}

    def _listtables(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"TableNames": sorted(self._tables)}

    def _describetimetolive(self, body: dict[str, Any]) -> dict[str, Any]:
        ttl = self._table(body).ttl
        status = {"TimeToLiveStatus": "ENABLED", "AttributeName": ttl} if ttl else {"TimeToLiveStatus": "DISABLED"}
        return {"TimeToLiveDescription": status}

    def _updatetimetolive(self, body: dict[str, Any]) -> dict[str, Any]:
        self._table(body).ttl = body["TimeToLiveSpecification"]["AttributeName"]
        return {"TimeToLiveSpecification": body["TimeToLiveSpecification"]}


def _holds(body: Mapping[str, Any], old: Item | None) -> bool:
    text = body.get("ConditionExpression")
    if text is None:
        return True
    meets = condition(text, tuple(body.get("ExpressionAttributeNames", {}).items()))
    return meets(old or {}, body.get("ExpressionAttributeValues", {}))


def _after(kind: str, body: Mapping[str, Any], old: Item | None) -> Item | None:
    if kind == "Put":
        item: Item = body["Item"]
        return item
    if kind == "Delete":
        return None
    text = body.get("UpdateExpression")
    before = old if old is not None else dict(body["Key"])
    if text is None:
        return before
    change = update(text, tuple(body.get("ExpressionAttributeNames", {}).items()))
    return change(before, body.get("ExpressionAttributeValues", {}))


def _page(body: Mapping[str, Any], table: _Table, found: Iterable[Item]) -> dict[str, Any]:
    """Return one page of the items that come after `ExclusiveStartKey`: at most `Limit`, and about a megabyte."""
    start = table.place(body["ExclusiveStartKey"]) if "ExclusiveStartKey" in body else None
    limit, size = body.get("Limit", 2**62), 0
    page: list[Item] = []
    answer: dict[str, Any] = {"Items": page}
    text = body.get("FilterExpression")
    keeps = condition(text, tuple(body.get("ExpressionAttributeNames", {}).items())) if text else None
    read = 0
    for item in found:
        place = table.place(item)
        if start is not None:
            start = None if place == start else start
            continue
        if keeps is None or keeps(item, body.get("ExpressionAttributeValues", {})):
            page.append(item)
        read, size = read + 1, size + _size(item)
        if read >= limit or size >= _PAGE:
            answer["LastEvaluatedKey"] = {key: item[key] for key in table.keys}
            break
    answer |= {"Count": len(page), "ScannedCount": read}
    return answer


def _units(old: Item | None, new: Item | None) -> int:
    """Return the write units of a write: those of the larger of both items."""
    return max(1, *(-(-_size(item) // 1024) for item in (old, new) if item is not None), 0)


def _size(item: Item) -> int:
    """Return about as many bytes as DynamoDB counts."""
    size, left = 0, [item]
    while left:
        value: Any = left.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                size += len(name)
                if isinstance(inner, str):
                    size += len(inner)
                else:
                    left.append(inner)
        elif isinstance(value, list):
            left += value
        else:
            size += len(value) if isinstance(value, str) else 1
    return size
