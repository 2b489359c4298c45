"""In-memory doubles of S3 and DynamoDB for unit tests. They record how they were used."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import IO, Any, TypeVar

import msgspec

from mdstore import exactjson
from mdstore.aws.concurrent import Call, ServiceCall, Task
from mdstore.aws.dynamodb.attributes import Item, from_attribute
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.retry import Retry
from mdstore.aws.s3 import Objects
from mdstore.errors import ConditionFailed, MdstoreError, NotFound, TransactionCancelled, Unavailable
from mdstore.model import Operation
from mdstore.store.operations import Indexed

T = TypeVar("T")
Actions = list[dict[str, Any]]
_DEFAULT = re.compile(r"(#\w+) = if_not_exists\(\1, (:\w+)\)")
_ONE_OF = re.compile(r"(#\w+) IN \((:\w+), (:\w+)\)")


def operation_of(item: Indexed) -> Operation:
    """Return the operation from which a line of a lane was made."""
    data = exactjson.loads(bytes(item.data)) if item.data else None
    if item.attribute:
        data = from_attribute(exactjson.loads(bytes(item.attribute)))
    return Operation(
        op=item.op,
        entity=item.entity,
        key=item.key,
        data=data,
        expect_version=item.expect_version,
        sequence=item.sequence,
        group=item.group,
    )


class MemoryObjects(Objects):
    """Keeps objects in a dict. `gets` lists each ranged read as key, start and end (exclusive)."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.gets: list[tuple[str, int, int]] = []

    def put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        if key in self.stored:
            return False
        if not isinstance(body, bytes):
            body.seek(0)
            body = body.read()
        self.stored[key] = body
        return True

    def get(self, key: str, start: int, end: int) -> bytes:
        self.gets.append((key, start, end))
        if key not in self.stored:
            raise NotFound("object", key)
        return self.stored[key][start:end]

    def put_new_task(self, key: str, body: bytes | IO[bytes]) -> Task[bool]:
        yield from ()
        return self.put_new(key, body)

    def get_task(self, key: str, start: int, end: int) -> Task[bytes]:
        yield from ()
        return self.get(key, start, end)


class OneByOne(DynamoClient):
    """Runs tasks one after the other. A subclass runs one."""

    def run(
        self,
        tasks: Iterable[Task[T]],
        *,
        in_flight: int = 1,  # noqa: ARG002
        deadline: float | None = None,  # noqa: ARG002
    ) -> list[T]:
        return [self._run_task(task) for task in tasks]

    def outcomes(
        self,
        tasks: Iterable[Task[T]],
        *,
        in_flight: int,  # noqa: ARG002
        deadline: float | None = None,  # noqa: ARG002
    ) -> list[T | Exception]:
        return [self._outcome(task) for task in tasks]

    def _outcome(self, task: Task[T]) -> T | Exception:
        try:
            return self._run_task(task)
        except Exception as error:
            return error

    def _run_task(self, task: Task[T]) -> T:
        raise NotImplementedError


class MemoryDynamo(OneByOne):
    """Keeps tables in dicts, and knows the conditions and update expressions that this package writes.

    `before` and `after` receive the actions of each transaction, before it is checked and after it is written; the caller gets
    what they raise. `attempts` holds the actions of each transaction sent, `written` of those that took effect.
    """

    def __init__(self) -> None:
        self.retry = Retry(patience=0)
        self.items: dict[tuple[str, str, str], Item] = {}
        self.before: Callable[[Actions], None] = lambda _: None
        self.after: Callable[[Actions], None] = lambda _: None
        self.attempts: list[Actions] = []
        self.written: list[Actions] = []
        self.calls: list[str] = []

    def _run_task(self, task: Task[T]) -> T:
        step: Callable[[], Call | ServiceCall] = partial(next, task)
        while True:
            try:
                call = step()
            except StopIteration as end:
                result: T = end.value
                return result
            assert not isinstance(call, ServiceCall)
            operation, body = call
            try:
                step = partial(task.send, self.call(operation, msgspec.json.decode(body)))
            except Unavailable:
                raise
            except MdstoreError as error:
                step = partial(task.throw, error)

    def _transactwriteitems(self, body: Mapping[str, Any]) -> Any:
        actions: Actions = body["TransactItems"]
        self.attempts.append(actions)
        self.before(actions)
        bodies = [next(iter(action.values())) for action in actions]
        places = [_place(one) for one in bodies]
        assert len(set(places)) == len(places), "two actions on one item"
        reasons = [self._reason(place, one) for place, one in zip(places, bodies, strict=True)]
        if any(reason["Code"] != "None" for reason in reasons):
            raise TransactionCancelled(reasons)
        for place, change in zip(places, bodies, strict=True):
            if "Item" in change:
                self.items[place] = change["Item"]
            elif "UpdateExpression" in change:
                self.items[place] = updated(self.items.get(place), change)
        self.written.append(actions)
        self.after(actions)
        return {}

    def call(self, operation: str, body: Mapping[str, Any] | bytes, *, deadline: float | None = None) -> Any:  # noqa: ARG002
        assert not isinstance(body, bytes)
        self.calls.append(operation)
        answer: Callable[[Mapping[str, Any]], Any] = getattr(self, f"_{operation.lower()}")
        return answer(body)

    def _reason(self, place: tuple[str, str, str], body: Mapping[str, Any]) -> dict[str, Any]:
        old = self.items.get(place)
        if meets(body, old):
            return {"Code": "None"}
        old_item = {"Item": copy.deepcopy(old)} if old and "ReturnValuesOnConditionCheckFailure" in body else {}
        return {"Code": "ConditionalCheckFailed", "Message": "The conditional request failed", **old_item}

    def _query(self, body: Mapping[str, Any]) -> Any:
        pk = body["ExpressionAttributeValues"][":pk"]["S"]
        found = sorted(place for place in self.items if place[:2] == (body["TableName"], pk))
        return {"Items": [copy.deepcopy(self.items[place]) for place in found]}

    def _getitem(self, body: Mapping[str, Any]) -> Any:
        item = self.items.get(_place(body))
        return {"Item": copy.deepcopy(item)} if item else {}

    def _putitem(self, body: Mapping[str, Any]) -> Any:
        if not meets(body, self.items.get(_place(body))):
            raise ConditionFailed("PutItem: the conditional request failed")
        self.items[_place(body)] = body["Item"]
        return {}

    def _updateitem(self, body: dict[str, Any]) -> Any:
        place = body["TableName"], body["Key"]["pk"]["S"], body["Key"]["sk"]["S"]
        old = self.items.get(place)
        body["ConditionExpression"] = _ONE_OF.sub(r"(\1 = \2 OR \1 = \3)", body["ConditionExpression"])
        if not meets(body, old):
            raise ConditionFailed("UpdateItem: the conditional request failed")
        names = body["ExpressionAttributeNames"]
        sets, _, removes = body["UpdateExpression"].partition(" REMOVE ")
        changes = [
            _DEFAULT.sub(r"\1 = \2", change)
            for change in re.split(r", (?=#)", sets.removeprefix("SET "))
            if not ((default := _DEFAULT.fullmatch(change)) and old and names[default[1]] in old)
        ]
        expression = f"SET {', '.join(changes)} REMOVE {removes or '#nothing'}"
        named = {**names, "#nothing": ""}
        change = {**body, "UpdateExpression": expression, "ExpressionAttributeNames": named}
        self.items[place] = updated(old, change)
        return {"Attributes": self.items[place]}

    def _batchgetitem(self, body: Mapping[str, Any]) -> Any:
        ((table, wanted),) = body["RequestItems"].items()
        places = [_place({"TableName": table, "Key": key}) for key in wanted["Keys"]]
        return {"Responses": {table: [copy.deepcopy(self.items[place]) for place in places if place in self.items]}}


def _place(body: Mapping[str, Any]) -> tuple[str, str, str]:
    key = body.get("Key") or body["Item"]
    return body["TableName"], key["pk"]["S"], key.get("sk", {"S": ""})["S"]


def meets(body: Mapping[str, Any], item: Item | None) -> bool:
    """Return whether `item` meets the condition of an action or call."""
    condition = body.get("ConditionExpression")
    names = body.get("ExpressionAttributeNames", {})
    return not condition or _holds(condition, names, body.get("ExpressionAttributeValues", {}), item or {})


def _holds(condition: str, names: Mapping[str, str], values: Item, item: Item) -> bool:
    """Evaluate `term AND term`, `term OR term`, `NOT (...)`, `(...)`, functions and comparisons."""
    for word, combine in ((" OR ", any), (" AND ", all)):
        terms = _split(condition, word)
        if len(terms) > 1:
            return combine([_holds(term, names, values, item) for term in terms])
    if condition.startswith("NOT "):
        return not _holds(condition.removeprefix("NOT "), names, values, item)
    if condition.startswith("("):
        return _holds(condition[1:-1], names, values, item)
    if condition.startswith("attribute_"):
        function, _, argument = condition.rstrip(")").partition("(")
        return (names.get(argument, argument) in item) == (function == "attribute_exists")
    left, sign, right = condition.split(" ")
    found: Any = {name: from_attribute(value) for name, value in item.items()}
    for name in left.split("."):
        if names[name] not in found:
            return False
        found = found[names[name]]
    wanted = from_attribute(values[right])
    return bool({"=": found == wanted, "<": found < wanted, "<>": found != wanted}[sign])


def _split(condition: str, word: str) -> list[str]:
    terms, depth, start = [], 0, 0
    for position, character in enumerate(condition):
        depth += (character == "(") - (character == ")")
        if not depth and condition.startswith(word, position):
            terms.append(condition[start:position])
            start = position + len(word)
    return [*terms, condition[start:]]


def updated(old: Item | None, body: Mapping[str, Any]) -> Item:
    """Return the item that `SET ... REMOVE ...` makes of `old`."""
    names, values = body["ExpressionAttributeNames"], body["ExpressionAttributeValues"]
    item = copy.deepcopy(old or body["Key"])
    sets, _, removes = body["UpdateExpression"].removeprefix("SET ").partition(" REMOVE ")
    for change in _split(sets, ", "):
        name, _, value = change.partition(" = ")
        if value == "if_not_exists(#version, :zero) + :count":
            before = int((old or {}).get("version", values[":zero"])["N"])
            item[names[name]] = {"N": str(before + int(values[":count"]["N"]))}
        else:
            item[names[name]] = values[value]
    for name in removes.split(", "):
        item.pop(names[name], None)
    return item
