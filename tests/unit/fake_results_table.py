"""An in-memory results table, and workers whose calls to it are interleaved as a test decides."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import Item
from mdstore.errors import ConditionFailed
from tests.unit.fakes import OneByOne

T = TypeVar("T")


class ResultsTable(OneByOne):
    """Answers one table's calls, and knows the expressions that the result backend writes.

    `before_call` is called before each call, with the operation's name.
    """

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.calls: list[str] = []
        self.before_call: Callable[[str], None] = lambda _: None

    def call(self, operation: str, body: Mapping[str, Any] | bytes, *, deadline: float | None = None) -> Any:  # noqa: ARG002
        if isinstance(body, bytes):
            body = msgspec.json.decode(body)
        self.before_call(operation)
        self.calls.append(operation)
        answer: Callable[[Any], Any] = getattr(self, f"_{operation.lower()}")
        return msgspec.json.decode(msgspec.json.encode(answer(body)))  # a copy, as over the wire

    def _run_task(self, task: Task[T]) -> T:
        try:
            call = next(task)
            while True:
                call = task.send(self.call(*call))
        except StopIteration as end:
            result: T = end.value
            return result

    def _putitem(self, body: Mapping[str, Any]) -> Any:
        key = body["Item"]["id"]["S"]
        self._check(key, body)
        self.items[key] = copy.deepcopy(body["Item"])
        return {}

    def _deleteitem(self, body: Mapping[str, Any]) -> Any:
        self.items.pop(body["Key"]["id"]["S"], None)
        return {}

    def _getitem(self, body: Mapping[str, Any]) -> Any:
        assert body["ConsistentRead"]
        found = self.items.get(body["Key"]["id"]["S"])
        return {"Item": found} if found else {}

    def _batchgetitem(self, body: Mapping[str, Any]) -> Any:
        ((table, asked),) = body["RequestItems"].items()
        assert asked["ConsistentRead"]
        assert len(asked["Keys"]) <= 100
        keys = [key["id"]["S"] for key in asked["Keys"]]
        return {"Responses": {table: [self.items[key] for key in keys if key in self.items]}}

    def _query(self, body: Mapping[str, Any]) -> Any:
        values = body["ExpressionAttributeValues"]
        found = [
            {"id": item["id"]}
            for item in self.items.values()
            if item.get("open") == values[":open"] and int(item["look_at"]["N"]) <= int(values[":now"]["N"])
        ]
        return {"Items": found}

    def _updateitem(self, body: Mapping[str, Any]) -> Any:
        key = body["Key"]["id"]["S"]
        self._check(key, body)
        item = self.items.setdefault(key, copy.deepcopy(body["Key"]))
        verb = ""
        for word in body["UpdateExpression"].replace(",", "").replace(" = ", " ").split():
            if word in ("SET", "ADD", "REMOVE"):
                verb = word
            elif word.startswith("#"):
                name = body["ExpressionAttributeNames"][word]
                if verb == "REMOVE":
                    item.pop(name, None)
            elif verb == "SET":
                item[name] = body["ExpressionAttributeValues"][word]
            else:
                ((kind, added),) = body["ExpressionAttributeValues"][word].items()
                item[name] = {kind: sorted({*item.get(name, {kind: []})[kind], *added})}
        return {"Attributes": item}

    def _check(self, key: str, body: Mapping[str, Any]) -> None:
        item = self.items.get(key, {})
        values = body.get("ExpressionAttributeValues", {})
        state, success = item.get("state"), {"S": "SUCCESS"}
        size, new = (int(one.get("N", "-1")) for one in (item.get("size", {}), values.get(":size", {})))
        undispatched = "attribute_exists(id) AND (attribute_not_exists(#dispatched) OR #dispatched <> :success)"
        known = {
            "": True,
            "attribute_not_exists(id)": not item,
            "attribute_exists(id)": bool(item),
            "attribute_exists(#open) AND #look_at = :seen": "open" in item and item["look_at"] == values.get(":seen"),
            "attribute_not_exists(#state) OR #state <> :success": state != success,
            "attribute_not_exists(#state) OR (#state <> :success AND #state <> :failure AND #state <> :revoked)": (
                state not in (success, {"S": "FAILURE"}, {"S": "REVOKED"})
            ),
            "attribute_exists(id) AND (attribute_not_exists(#size) OR #size = :size)": bool(item) and size in (-1, new),
            f"{undispatched} AND (attribute_not_exists(#claimed) OR #claimed = :claimed)": bool(item)
            and item.get("fired") != {"S": "success"}
            and item.get("taken") in (None, values.get(":claimed")),
            "attribute_exists(id) AND attribute_not_exists(#dispatched) AND (attribute_not_exists(#claimed_unclean) OR"
            " #claimed_unclean = :claimed_unclean)": bool(item)
            and "fired" not in item
            and item.get("taken_unclean") in (None, values.get(":claimed_unclean")),
            "attribute_exists(id) AND attribute_not_exists(#dispatched)": bool(item) and "fired" not in item,
            "attribute_exists(id) AND #size < :size": bool(item) and -1 < size < new,
            undispatched: bool(item) and item.get("fired") != {"S": "success"},
        }
        if not known[body.get("ConditionExpression", "")]:
            raise ConditionFailed("the conditional request failed")


class Killed(BaseException):
    """Raised in a worker to kill it between two of its calls."""


class Workers:
    """Runs jobs concurrently, one call at a time.

    `choose(n)` picks which of n jobs runs to its next call, and `dies()` returns whether that job is killed instead.
    """

    def __init__(self, choose: Callable[[int], int], dies: Callable[[], bool]) -> None:
        self._choose = choose
        self._dies = dies
        self._local = threading.local()
        self._waiting: list[_Worker] = []
        self._error: BaseException | None = None

    def start(
        self, job: Callable[[], None], *, done: Callable[[bool], None] = lambda _: None, mortal: bool = True
    ) -> None:
        """Begin a job. `done` is told whether the job was killed; a job that is not `mortal` never is."""
        self._waiting.append(_Worker(self, job, done, mortal=mortal))

    def checkpoint(self, _operation: str) -> None:
        """Pause the job that calls this; jobs call it before each of their calls."""
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is not None:
            worker.pause()

    def run(self) -> None:
        """Run until every job is done."""
        while self._waiting:
            worker = self._waiting.pop(self._choose(len(self._waiting)))
            if worker.resume(kill=worker.mortal and worker.begun and self._dies()):
                self._waiting.append(worker)
            if self._error is not None:
                raise self._error


class _Worker:
    """Runs one job in a thread, from one call to the next."""

    def __init__(
        self, workers: Workers, job: Callable[[], None], done: Callable[[bool], None], *, mortal: bool
    ) -> None:
        self._workers = workers
        self.mortal = mortal
        self._job = job
        self._done = done
        self._go = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._kill = self._is_over = self._killed = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def begun(self) -> bool:
        return self._thread.ident is not None

    def resume(self, *, kill: bool) -> bool:
        """Run the job to its next call, and return whether there is one."""
        self._kill = kill
        if self.begun:
            self._go.release()
        else:
            self._thread.start()
        assert self._paused.acquire(timeout=10)
        if self._is_over:
            self._thread.join()
            self._done(self._killed)
        return not self._is_over

    def pause(self) -> None:
        self._paused.release()
        self._go.acquire()
        if self._kill:
            raise Killed

    def _run(self) -> None:
        self._workers._local.worker = self
        try:
            self._job()
        except Killed:
            self._killed = True
        except BaseException as error:
            self._workers._error = error
        self._is_over = True
        self._paused.release()
