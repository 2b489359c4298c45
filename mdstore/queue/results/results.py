"""Celery's results in DynamoDB: one item each, strongly consistent, with a TTL; what is large lies in S3.

id = celery-task-meta-{id}        result (as Celery encodes it), state, ttl
id = celery-taskset-meta-{id}     a group's result, ttl
blob                              instead of a result that is large: prefix, key, digest, size
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

from celery import states
from celery.backends.base import KeyValueStoreBackend
from celery.result import AsyncResult, GroupResult
from celery.utils.log import get_logger
from kombu.exceptions import EncodeError
from kombu.utils.encoding import bytes_to_str

from mdstore import exactjson
from mdstore.aws.blobs import Blob, Blobs
from mdstore.aws.dynamodb.attributes import from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.dynamodb.updates import expressions
from mdstore.model import CLAIM_DAYS
from mdstore.settings import DAY

logger = get_logger(__name__)

#: Bytes of a result that stands in its item: 100 of them fit into the 16 MB of one BatchGetItem.
_INLINE = 128 * 2**10
_BATCH = 100
_IN_FLIGHT = 8
#: Results that are in memory as text at the same time where many are looked at.
_LOOK = 1_000


class BatchedGroupResult(GroupResult):
    """A group's result that reads its parts' a hundred a call.

    Whoever waits for a chord looks twice a second whether a part has failed, and Celery would read one part after the other.
    """

    def maybe_throw(self, callback: Any = None, propagate: bool = True) -> None:
        """Raise the error of the first part that failed. `callback` is given None for a part that has not ended."""
        ours = [one for one in self.results if isinstance(one, AsyncResult) and isinstance(one.backend, DynamoResults)]
        unknown = [one for one in ours if one._cache is None]
        for start in range(0, len(unknown), _LOOK):
            some = unknown[start : start + _LOOK]
            metas = some[0].backend.metas(one.id for one in some)
            for one in some:
                one._maybe_set_cache(metas.get(one.id))
        pending = {id(one) for one in unknown if one._cache is None}
        for one in self.results:
            if id(one) not in pending:
                one.maybe_throw(callback=callback, propagate=propagate)
            elif callback is not None:
                callback(one.id, None)

    maybe_reraise = maybe_throw


class DynamoResults(KeyValueStoreBackend):
    """Results, without chords."""

    supports_autoexpire = True
    persistent = True

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
        # A part may be delivered as long as its message lives; its join, and what others returned, must be there then.
        return max(int(self.app.settings.receipt_days * DAY), int(self.expires or 0))

    # -- key and value

    def get(self, key: Any) -> str | None:
        """One value, strongly consistent."""
        return self.mget([key])[0]

    def mget(self, keys: Iterable[Any]) -> list[str | None]:
        """Values of `keys`, None where there is none; calls for 100 each, at the same time."""
        wanted = [bytes_to_str(key) for key in keys]
        asked = [to_item({"id": key}) for key in dict.fromkeys(wanted)]
        batches = (asked[start : start + _BATCH] for start in range(0, len(asked), _BATCH))
        answers = self._dynamo.run(
            (self._dynamo.batch_get(self._table, batch) for batch in batches), in_flight=_IN_FLIGHT
        )
        found = {item["id"]["S"]: self._text(from_item(item), "result") for items in answers for item in items}
        return [found.get(key) for key in wanted]

    def metas(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is stored of tasks, by id, as Celery encodes it."""
        wanted = list(ids)
        texts = self.mget([self.get_key_for_task(one) for one in wanted])
        return {one: self.decode(text) for one, text in zip(wanted, texts, strict=True) if text is not None}

    def set(self, key: Any, value: Any) -> None:
        """Store a value for as long as anything is kept."""
        self._put(key, value, seconds=self._retention)

    def delete(self, key: Any) -> None:
        """Forget a value."""
        self._dynamo.call("DeleteItem", {"TableName": self._table, "Key": to_item({"id": bytes_to_str(key)})})

    def expire(self, key: Any, value: Any) -> None:
        """Do nothing: every item is written with its TTL."""

    def wait_for(self, task_id: Any, *args: Any, on_interval: Any = None, **kwargs: Any) -> Any:
        """Wait for a task; where it failed, look at its parents once more, whose own error `get` prefers.

        Celery looks between its polls, so whether it finds a chord's part to have failed is a matter of time.
        """
        meta = super().wait_for(task_id, *args, on_interval=on_interval, **kwargs)
        if on_interval and meta["status"] in states.PROPAGATE_STATES:
            on_interval()
        return meta

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Store a task's state in one call, where Celery makes two; a success stays, whatever a duplicate comes to."""
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        seconds = self._retention if getattr(request, "chord", None) else int(self.expires or DAY)
        self._put(self.get_key_for_task(task_id), self.encode(meta), seconds=seconds, state=state)
        return result

    def _put(self, key: Any, value: Any, *, seconds: int, state: str | None = None) -> None:
        text = self._placed(bytes_to_str(value), "result", inline=_INLINE)
        body: dict[str, Any] = {
            "TableName": self._table,
            "Item": to_item({"id": bytes_to_str(key), **text, "state": state, "ttl": int(time.time()) + seconds}),
        }
        if state is not None:
            body |= expressions(condition="attribute_not_exists(#state) OR #state <> :success")
            body["ExpressionAttributeValues"] = to_item({":success": states.SUCCESS})
        if not self._dynamo.put_if(body):
            logger.debug("%s has succeeded: %s is not stored", key, state)

    def _placed(self, text: str, name: str, *, inline: int) -> dict[str, Any]:
        """Attributes that hold a text: itself, or where it lies in S3. Raises `EncodeError` where it is larger than allowed."""
        size = len(text.encode())
        if size <= inline:
            return {name: text}
        settings = self.app.settings
        most = settings.max_lane_bytes
        content = exactjson.dumps(text)
        if len(content) > most:
            raise EncodeError(f"{name} of {size} bytes: at most {most} are stored")
        # Beside the claims, which a lifecycle rule deletes after so many days; what is stored again on another day lives on.
        prefix = f"{settings.claim_prefix}{CLAIM_DAYS[0]}/{time.strftime('%Y-%m-%d', time.gmtime())}/"
        blob = self._blobs(prefix).put(content)
        return {"blob": {"prefix": prefix, "key": blob.key, "digest": blob.digest, "size": blob.size}}

    def _text(self, item: Mapping[str, Any], name: str) -> str:
        blob = item.get("blob")
        if blob is None:
            return cast("str", item[name])
        found = Blob(key=blob["key"], digest=blob["digest"], size=blob["size"])
        return cast("str", self._blobs(blob["prefix"]).get(found))

    def _blobs(self, prefix: str) -> Blobs:
        return Blobs(objects=self.app.aws.objects, prefix=prefix, max_bytes=self.app.settings.max_lane_bytes)
