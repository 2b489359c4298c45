"""A result backend on DynamoDB whose chords survive duplicate deliveries.

Celery's own counts the parts that returned, so one message delivered twice breaks the chord. Here a chord keeps the set of
the parts that returned: adding a part again changes nothing. The callback is published by whoever finds the set complete,
and again by a redelivered last part when the first publisher died before it could note `fired`. A chord that failed fires
again, with its callback, when its failed parts are delivered again and succeed.

    id = celery-task-meta-{id}      result, state as JSON         ttl
    id = chord-join-{group id}      size, parts, failed (number sets), fired (success | failure)     ttl
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from celery import states
from celery.backends.base import KeyValueStoreBackend
from celery.canvas import group as CeleryGroup  # noqa: N812  celery's class of groups has a function's name
from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, allow_join_result
from celery.utils.log import get_logger
from kombu.utils.encoding import bytes_to_str

from mdstore.dynamo.client import DynamoClient
from mdstore.dynamo.marshal import from_item, to_item
from mdstore.settings import DAY

logger = get_logger(__name__)


class DynamoBackend(KeyValueStoreBackend):
    """A drop-in for any app made by `create_app`."""

    supports_autoexpire = True
    persistent = True

    @property
    def _dynamo(self) -> DynamoClient:
        client: DynamoClient = self.app.store.aws.dynamo
        return client

    @property
    def _table(self) -> str:
        table: str = self.app.store.settings.results_table
        return table

    def _expires(self) -> int:
        return int(time.time() + (self.expires or 86_400))

    def _join_expires(self) -> int:
        # A part may be delivered as long as its message lives, and its join must be there then.
        return int(time.time() + self.app.settings.receipt_days * DAY)

    # -- key and value

    def get(self, key: Any) -> str | None:
        """One value, strongly consistent."""
        return self.mget([key])[0]

    def mget(self, keys: Iterable[Any]) -> list[str | None]:
        """Values of `keys`, None where there is none, 100 a call."""
        wanted = [bytes_to_str(key) for key in keys]
        asked = [to_item({"id": key}) for key in dict.fromkeys(wanted)]
        found = {item["id"]["S"]: item["result"]["S"] for item in self._dynamo.batch_get(self._table, asked)}
        return [found.get(key) for key in wanted]

    def set(self, key: Any, value: Any) -> None:
        """Store a value for as long as results are kept."""
        item = to_item({"id": bytes_to_str(key), "result": bytes_to_str(value), "ttl": self._expires()})
        self._dynamo.call("PutItem", {"TableName": self._table, "Item": item})

    def delete(self, key: Any) -> None:
        """Forget a value."""
        self._dynamo.call("DeleteItem", {"TableName": self._table, "Key": to_item({"id": bytes_to_str(key)})})

    def expire(self, key: Any, value: Any) -> None:
        """Do nothing: every item is written with its TTL."""

    # -- chords

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> None:
        """Remember a chord's parts before any of them is published."""
        if _wants_results(body):
            self._apply_chord_incr(header_result_args, body, **kwargs)
        header = self.app.GroupResult(*header_result_args)
        item = to_item({"id": _join_key(header.id), "size": len(header.results), "ttl": self._join_expires()})
        self._dynamo.call("PutItem", {"TableName": self._table, "Item": item})

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:  # noqa: ARG002
        """Note that a part returned; the part that completes the set publishes the callback."""
        group, index = request.group, request.group_index
        if not group or index is None:
            return
        join = self._note_part(group, index, failed=state != states.SUCCESS)
        if "size" not in join:
            logger.error("chord %s: part %s returned after the chord's record had expired", group, index)
            return
        outcome = "failure" if join.get("failed") else "success"
        if len(join["parts"]) >= join["size"] and join.get("fired") not in ("success", outcome):
            self._fire(group, maybe_signature(request.chord, app=self.app), outcome)

    def _note_part(self, group: str, index: int, *, failed: bool) -> dict[str, Any]:
        added = "parts :part, failed :part" if failed else "parts :part"
        # A part that failed and then succeeded in another delivery did succeed.
        expression = f"ADD {added}" if failed else f"ADD {added} DELETE failed :part"
        answer = self._dynamo.call("UpdateItem", {
            "TableName": self._table,
            "Key": to_item({"id": _join_key(group)}),
            "UpdateExpression": f"SET #ttl = if_not_exists(#ttl, :ttl) {expression}",
            "ExpressionAttributeNames": {"#ttl": "ttl"},
            "ExpressionAttributeValues": {":part": {"NS": [str(index)]}, ":ttl": {"N": str(self._join_expires())}},
            "ReturnValues": "ALL_NEW",
        })  # fmt: skip
        return from_item(answer["Attributes"])

    def _fire(self, group: str, callback: Any, outcome: str) -> None:
        """Publish the callback, then note it: in this order a crash repeats the callback and never loses it."""
        try:
            results = self._results(group, callback, outcome)
        except Exception as error:
            self.chord_error_from_stack(callback, ChordError(f"a part of the chord failed: {error!r}"))
        else:
            callback.delay(results)
        self._dynamo.call("UpdateItem", {
            "TableName": self._table,
            "Key": to_item({"id": _join_key(group)}),
            "UpdateExpression": "SET fired = :outcome",
            "ExpressionAttributeValues": to_item({":outcome": outcome}),
        })  # fmt: skip

    def _results(self, group: str, callback: Any, outcome: str) -> list[Any]:
        """The parts' results in their order; raises a failed part's exception."""
        if not _wants_results(callback):
            if outcome == "failure":
                raise ChordError(f"see the results of the parts of group {group}")
            return []
        header = GroupResult.restore(group, backend=self, app=self.app)
        with allow_join_result():
            results: list[Any] = header.join_native(timeout=self.app.conf.result_chord_join_timeout, propagate=True)
        return results


def _wants_results(callback: Any) -> bool:
    """Whether the callback takes the parts' results; of a chain its first task decides, of a group any."""
    tasks = getattr(callback, "tasks", None)
    if not tasks:
        return not callback.immutable
    return any(_wants_results(task) for task in (tasks if isinstance(callback, CeleryGroup) else tasks[:1]))


def _join_key(group: str) -> str:
    return f"chord-join-{group}"
