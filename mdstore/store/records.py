"""Records: the current state of each key, read with strong consistency.

An item of the records table has `pk` = `{entity}#{key}`, `entity`, `key`, `data` (a map) or `blob` (a pointer), `version`,
optionally `sequence`, `updated_at` (Unix milliseconds) and `updated_by` = `{request}/{lane}/{transaction}`. A tombstone has
`deleted` and `expires_at` instead of data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from mdstore.aws.blobs import Blob, Blobs
from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import Item, from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.errors import NotFound

Key = tuple[str, str]  # entity, key
_PAGE = 1_000  # items that one Scan call of a listing reads
_PAGES = 4  # the most Scan calls, of up to 1 MB each, per page of a listing, even if they find few items of the entity
_PAGE_DATA = 16 * 2**20  # bytes of data in S3 after which a page ends; a single record may have this many


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The current state of one key. `updated_at` is in Unix seconds. `data` is None in a tombstone."""

    entity: str
    key: str
    version: int
    data: dict[str, Any] | None
    updated_at: float
    updated_by: str
    sequence: int | None = None
    deleted: bool = False


class Records:
    """Reads the records table. Only the writer writes to it."""

    def __init__(self, *, dynamo: DynamoClient, table: str, blobs: Blobs) -> None:
        self._dynamo = dynamo
        self._table = table
        self._blobs = blobs

    def get(self, entity: str, key: str) -> Record:
        """Read one record. Raises `NotFound`."""
        return existing(self.look_up([(entity, key)]).get((entity, key)), entity, key)

    def look_up(self, keys: Iterable[Key]) -> dict[Key, Record]:
        """Read the existing records of `keys`, including tombstones."""
        (items,) = self._dynamo.run([self.items(keys)])
        return {key: self.read(item) for key, item in items.items()}

    def items(self, keys: Iterable[Key]) -> Task[dict[Key, Item]]:
        """Task: read the existing items of `keys`, in DynamoDB JSON."""
        asked = [to_item({"pk": primary_key(*key)}) for key in dict.fromkeys(keys)]
        items = yield from self._dynamo.batch_get(self._table, asked)
        return {_key_of(item): item for item in items}

    def export(self, entity: str | None = None, *, segments: int = 4) -> Iterator[Record]:
        """Yield all records, or those of `entity`, in any order and without tombstones. Scan in parallel segments."""
        with ThreadPoolExecutor(segments) as pool:
            pages = [self._scan(entity, segment, segments) for segment in range(segments)]
            futures = {pool.submit(next, page, None): page for page in pages}
            while futures:
                future, page = next(iter(futures.items()))
                items = future.result()
                del futures[future]
                if items is None:
                    continue
                futures[pool.submit(next, page, None)] = page
                yield from (self.read(item) for item in items)

    def page(self, entity: str, *, limit: int, cursor: Mapping[str, Any] | None) -> tuple[list[Record], Any]:
        """Return up to `limit` records of one entity, and the cursor of the next page (None at the end).

        A page reads at most 4,000 items or 4 MB of the table, and about 16 MiB of data in S3. So a page may be short, or empty
        if the entity is rare in the table.
        """
        body = self._scan_body(entity) | {"Limit": _PAGE}
        records: list[Record] = []
        data = 0
        for _ in range(_PAGES):
            if cursor:
                body["ExclusiveStartKey"] = cursor
            answer = self._dynamo.call("Scan", body)
            items = answer["Items"]
            cursor = answer.get("LastEvaluatedKey")
            for number, item in enumerate(items, 1):
                records.append(self.read(item))
                data += _size_in_s3(item)
                if number < len(items) and (len(records) == limit or data >= _PAGE_DATA):
                    return records, {"pk": item["pk"]}
            if data >= _PAGE_DATA or cursor is None or len(records) == limit:
                break
        return records, cursor

    def read(self, item: Item) -> Record:
        """Read a record from its item, and its data from S3 where the item has a pointer."""
        return self._blobs.run(self.read_task(item))

    def read_task(self, item: Item) -> Task[Record]:
        """Task: do what `read` does."""
        values = from_item(item)
        data = values.get("data")
        if "blob" in values:
            data = yield from self._blobs.get_task(msgspec.convert(values["blob"], Blob))
        return Record(
            entity=values["entity"],
            key=values["key"],
            version=values["version"],
            data=data,
            updated_at=values["updated_at"] / 1000,
            updated_by=values["updated_by"],
            sequence=values.get("sequence"),
            deleted=values.get("deleted", False),
        )

    def _scan(self, entity: str | None, segment: int, segments: int) -> Iterator[Sequence[Item]]:
        body = self._scan_body(entity) | {"Segment": segment, "TotalSegments": segments}
        yield from self._dynamo.pages("Scan", body)

    def _scan_body(self, entity: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "TableName": self._table,
            "ConsistentRead": True,
            "FilterExpression": "attribute_not_exists(deleted)",
        }
        if entity is not None:
            body["FilterExpression"] += " AND entity = :entity"
            body["ExpressionAttributeValues"] = to_item({":entity": entity})
        return body


def existing(record: Record | None, entity: str, key: str) -> Record:
    """Return `record`. Raises `NotFound` if there is none, or only its tombstone."""
    if record is None or record.deleted:
        raise NotFound("record", f"{entity}/{key}")
    return record


def primary_key(entity: str, key: str) -> str:
    """Return the partition key of a record. It is unique, because the name of an entity contains no `#`."""
    return f"{entity}#{key}"


def _size_in_s3(item: Item) -> int:
    return int(item["blob"]["M"]["size"]["N"]) if "blob" in item else 0


def _key_of(item: Item) -> Key:
    entity, _, key = item["pk"]["S"].partition("#")
    return entity, key
