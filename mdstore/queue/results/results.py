"""Celery's results in DynamoDB: one item each, with a TTL and strongly consistent reads. Large results are in S3.

id = celery-task-meta-{id}        result (as Celery encodes it), state, ttl
id = celery-taskset-meta-{id}     result (of a group), ttl
in either                         blob, instead of a large result: prefix, key, digest, size
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from celery import states
from celery.backends.base import KeyValueStoreBackend
from celery.result import AsyncResult, GroupResult
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import bytes_to_str

from mdstore import exactjson
from mdstore.aws.blobs import Blob, Blobs
from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.dynamodb.updates import expressions
from mdstore.model import CLAIM_DAYS
from mdstore.queue.broker.ascii_json import check_objects
from mdstore.queue.settings import where
from mdstore.settings import DAY

logger = get_logger(__name__)

#: The largest result, in bytes, that an item holds: 100 of them fit into the 16 MB of one BatchGetItem.
_MAX_INLINE_RESULT = 128 * 2**10
_BATCH = 100
_IN_FLIGHT = 8
#: The most results that are decoded at once when a group is checked.
_MAX_DECODED = 1_000
#: The state of an item that holds a provisional failure, recorded for a message that may be forged.
_PROVISIONAL = "PROVISIONAL"
_ENDED = {":success": states.SUCCESS, ":failure": states.FAILURE, ":revoked": states.REVOKED}


def _owns_nothing(_request: Any) -> bool:
    """Return False: for most tasks, nothing proves that a stored result is their own."""
    return False


class BatchedGroupResult(GroupResult):
    """Reads the results of a group's parts, a hundred per call, or of a chord's parts only those that have failed.

    A caller that waits for a chord checks twice a second whether a part has failed. Celery would read the parts one by one.
    """

    def maybe_throw(self, callback: Any = None, propagate: bool = True) -> None:
        """Raise the error of the first part that failed. `callback` gets None as the result of a part that has not ended."""
        backend = self.backend
        is_chord = callback is None and isinstance(backend, DynamoResults)
        self._maybe_throw(callback, propagate, backend.failed_parts(self.id) if is_chord else None)

    maybe_reraise = maybe_throw

    def _maybe_throw(self, callback: Any, propagate: bool, failed: Collection[str] | None) -> None:
        """Do what `maybe_throw` does. Do not read parts that are not in `failed`; None means that any may have failed."""
        ours = [one for one in self.results if isinstance(one, AsyncResult) and isinstance(one.backend, DynamoResults)]
        unknown = [one for one in ours if one._cache is None]
        asked = [one for one in unknown if failed is None or one.id in failed]
        for start in range(0, len(asked), _MAX_DECODED):
            chunk = asked[start : start + _MAX_DECODED]
            metas = chunk[0].backend.metas(one.id for one in chunk)
            for one in chunk:
                one._maybe_set_cache(metas.get(one.id))
        pending = {id(one) for one in unknown if one._cache is None}
        for one in self.results:
            if failed is not None and isinstance(one, BatchedGroupResult):  # its parts are parts of the chord
                one._maybe_throw(callback, propagate, failed)
            elif id(one) not in pending:
                one.maybe_throw(callback=callback, propagate=propagate)
            elif callback is not None:
                callback(one.id, None)


class DynamoResults(KeyValueStoreBackend):
    """Stores the results of tasks and groups; `DynamoBackend` adds the chords."""

    supports_autoexpire = True
    persistent = True
    _is_provisional = False
    _later: list[Task[Any]] | None = None

    @property
    def _dynamo(self) -> DynamoClient:
        client: DynamoClient = self.app.aws.dynamo
        return client

    @property
    def _table(self) -> str:
        table: str = self.app.settings.results_table
        return table

    @property
    def _retention(self) -> int:
        # A part may be delivered for as long as its message lives, and then needs the chord's state and the other results.
        return max(int(self.app.settings.receipt_days * DAY), int(self.expires or 0))

    def as_uri(self, include_password: bool = False) -> str:  # noqa: ARG002
        """Return region, table and endpoint, which the worker's banner shows."""
        settings = self.app.settings
        return f"dynamodb://{settings.region}/{self._table} ({where(settings, 'dynamodb')})"

    def failed_parts(self, group_id: str) -> Collection[str] | None:  # noqa: ARG002
        """Return None: this backend has no chords."""
        return None

    # -- key and value

    def _encode(self, data: Any) -> Any:
        """Encode a value to store. Raises `EncodeError` if it could not be decoded again."""
        encoded = super()._encode(data)
        try:
            check_objects(bytes_to_str(encoded[2]))
        except ValueError as error:
            raise EncodeError(str(error)) from error
        return encoded

    def get(self, key: Any) -> str | None:
        """Return the value of a key, or None if there is none."""
        return self.mget([key])[0]

    def mget(self, keys: Iterable[Any]) -> list[str | None]:
        """Return the value of each key, or None if there is none. Concurrent calls read 100 keys each."""
        wanted = [bytes_to_str(key) for key in keys]
        asked = [to_item({"id": key}) for key in dict.fromkeys(wanted)]
        batches = (asked[start : start + _BATCH] for start in range(0, len(asked), _BATCH))
        answers = self._dynamo.run(
            (self._dynamo.batch_get(self._table, batch) for batch in batches), in_flight=_IN_FLIGHT
        )
        found = {item["id"]["S"]: self._load_text(from_item(item), "result") for items in answers for item in items}
        return [found.get(key) for key in wanted]

    def metas(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the decoded metadata of each task that has any stored, by task id."""
        wanted = list(ids)
        texts = self.mget([self.get_key_for_task(one) for one in wanted])
        return {one: self.decode(text) for one, text in zip(wanted, texts, strict=True) if text is not None}

    def set(self, key: Any, value: Any) -> None:
        """Store a value with the longest TTL that this backend uses."""
        self._put(key, value, seconds=self._retention)

    def delete(self, key: Any) -> None:
        """Delete a value."""
        self._dynamo.call("DeleteItem", {"TableName": self._table, "Key": to_item({"id": bytes_to_str(key)})})

    def expire(self, key: Any, value: Any) -> None:
        """Do nothing, because every item is written with its TTL."""

    def wait_for(self, task_id: Any, *args: Any, on_interval: Any = None, **kwargs: Any) -> Any:
        """Wait for a task. If it failed, call `on_interval` once more, which raises the error of a parent that failed.

        Celery calls it only between polls, so without this a race would decide whether `get` raises the error of a chord's part
        or of the chord.
        """
        meta = super().wait_for(task_id, *args, on_interval=on_interval, **kwargs)
        if on_interval and meta["status"] in states.PROPAGATE_STATES:
            on_interval()
        return meta

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Store a task's state in one call; Celery makes two. A stored success stays, whatever the result of a duplicate.

        Only the success of a task whose `owns_result` is true replaces it: another message with its id stored the first one.
        """
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        seconds = self._retention if getattr(request, "chord", None) else int(self.expires or DAY)
        if self._is_provisional:
            state = _PROVISIONAL
        key, replaces = self.get_key_for_task(task_id), state == states.SUCCESS and self._owns_result(request)
        self._put(key, self.encode(meta), seconds=seconds, state=state, replaces=replaces)
        return result

    def _owns_result(self, request: Any) -> bool:
        task = self.app.tasks.get(getattr(request, "task", None))
        return task is not None and getattr(task, "owns_result", _owns_nothing)(request)

    def _has_ended(self, task_id: Any) -> bool:
        """Return whether a task's own end is stored."""
        key = to_item({"id": bytes_to_str(self.get_key_for_task(task_id))})
        found = self._dynamo.call("GetItem", {"TableName": self._table, "Key": key, "ConsistentRead": True})
        return from_item(found.get("Item", {})).get("state") in _ENDED.values()

    @contextmanager
    def _storing_provisionally(self) -> Iterator[None]:
        """Store failures inside the context as provisional ones. Each thread has a backend of its own."""
        self._is_provisional = True
        try:
            yield
        finally:
            self._is_provisional = False

    @contextmanager
    def storing_later(self) -> Iterator[list[Task[Any]]]:
        """Collect the writes of successes inside the context, as tasks for the caller to run, instead of making them."""
        writes: list[Task[Any]] = []
        self._later = writes
        try:
            yield writes
        finally:
            self._later = None

    def _put(self, key: Any, value: Any, *, seconds: int, state: str | None = None, replaces: bool = False) -> None:
        text = self._store_text(bytes_to_str(value), "result", inline=_MAX_INLINE_RESULT)
        body: dict[str, Any] = {
            "TableName": self._table,
            "Item": to_item({"id": bytes_to_str(key), **text, "state": state, "ttl": int(time.time()) + seconds}),
        }
        if state in (_PROVISIONAL, states.REVOKED):
            # Any message with the task's id may be refused or expire, so neither replaces an end of the task.
            not_ended = " AND ".join(f"#state <> {value}" for value in _ENDED)
            body |= expressions(condition=f"attribute_not_exists(#state) OR ({not_ended})")
            body["ExpressionAttributeValues"] = to_item(_ENDED)
        elif state is not None and not replaces:
            body |= expressions(condition="attribute_not_exists(#state) OR #state <> :success")
            body["ExpressionAttributeValues"] = to_item({":success": states.SUCCESS})
        if self._later is not None and state == states.SUCCESS:
            self._later.append(self._dynamo.put_if_task(body))
        elif not self._dynamo.put_if(body):
            logger.debug("%s has ended already: the state %s is not stored", key, state)

    def _store_text(self, text: str, name: str, *, inline: int) -> dict[str, Any]:
        """Return the attributes that hold a text: the text itself up to `inline` bytes, and beyond that its location in S3.

        Upload the text in the latter case. Raises `EncodeError` if it is larger than `max_lane_bytes`.
        """
        size = len(text.encode())
        if size <= inline:
            return {name: text}
        settings = self.app.settings
        most = settings.max_lane_bytes
        content = exactjson.dumps(text)
        if len(content) > most:
            raise EncodeError(f"{name} of {size} bytes: at most {most} can be stored")
        # The claims' lifecycle rule deletes this prefix after CLAIM_DAYS[0] days. The date in it gives a text that is stored
        # again on another day a new lifetime.
        prefix = f"{settings.claim_prefix}{CLAIM_DAYS[0]}/{time.strftime('%Y-%m-%d', time.gmtime())}/"
        blob = self._blobs(prefix).put(content)
        return {"blob": {"prefix": prefix, "key": blob.key, "digest": blob.digest, "size": blob.size}}

    def _load_text(self, item: Mapping[str, Any], name: str) -> str:
        """Return the text that the attributes from `_store_text` hold."""
        blob = item.get("blob")
        if blob is None:
            return cast("str", item[name])
        found = Blob(key=blob["key"], digest=blob["digest"], size=blob["size"])
        return cast("str", self._blobs(blob["prefix"]).get(found))

    def _blobs(self, prefix: str) -> Blobs:
        return Blobs(objects=self.app.aws.objects, prefix=prefix, max_bytes=self.app.settings.max_lane_bytes)
