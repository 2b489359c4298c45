"""The services that answer the writers' calls in DynamoDB's place, and a recorder of the transactions that took effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from mdstore.aws.dynamodb.attributes import Item, from_item
from mdstore.aws.http import Response, SignedHttp
from mdstore.errors import ConditionFailed, RequestRejected, TransactionCancelled
from mdstore.model import Reason
from tests.model.history import Commit, require
from tests.model.model import Key, Known
from tests.unit.fakes import Actions, MemoryDynamo


class Service(Protocol):
    """A DynamoDB that takes an operation and a body in DynamoDB JSON, and returns an answer."""

    def answer(self, operation: str, body: bytes) -> Response:
        """Carry out a call."""

    def forget(self) -> None:
        """Forget all tokens, as DynamoDB does after ten minutes."""


class Tables(MemoryDynamo):
    """Tables in memory that reject the writes of one entity as malformed."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self._odd = f"{odd}#"
        self.before = self._check

    def _check(self, actions: Actions) -> None:
        for action in actions:
            body = next(iter(action.values()))
            if (body.get("Key") or body["Item"])["pk"]["S"].startswith(self._odd):
                raise RequestRejected("one or more parameter values were invalid", code="ValidationException")


class MemoryService:
    """Tables in memory behind DynamoDB's JSON protocol, with its tokens and its limits of a transaction."""

    def __init__(self, tables: MemoryDynamo, *, actions: int, size: int) -> None:
        self._tables = tables
        self._actions = actions
        self._size = size
        self._tokens: dict[str, bytes] = {}

    def forget(self) -> None:
        self._tokens.clear()

    def answer(self, operation: str, body: bytes) -> Response:
        call = msgspec.json.decode(body)
        if len(call.get("TransactItems", ())) > self._actions or len(body) > self._size:
            return failure("ValidationException", message="more than a transaction may hold")
        token = call.pop("ClientRequestToken", None)
        if token in self._tokens:
            same = self._tokens[token] == body
            return json_answer(200) if same else failure("IdempotentParameterMismatchException")
        try:
            content = self._tables.call(operation, call)
        except TransactionCancelled as cancelled:
            return failure("TransactionCanceledException", CancellationReasons=cancelled.reasons)
        except ConditionFailed:
            return failure("ConditionalCheckFailedException")
        except RequestRejected as rejected:
            return failure("ValidationException", message=str(rejected))
        if token:
            self._tokens[token] = body
        return json_answer(200, content)


class RealService:
    """DynamoDB behind a URL."""

    def __init__(self, http: SignedHttp, url: str) -> None:
        self._http = http
        self._url = url

    def forget(self) -> None:
        """Do nothing: a real service cannot be told to forget its tokens."""

    def answer(self, operation: str, body: bytes) -> Response:
        headers = ("Content-Type: application/x-amz-json-1.0", f"X-Amz-Target: DynamoDB_20120810.{operation}")
        return self._http.send(self._url, headers, body)

    def create_table(self, name: str, key: Sequence[str]) -> None:
        """Create a table; `key` names its partition key, and its sort key if it has one."""
        body = {
            "TableName": name,
            "BillingMode": "PAY_PER_REQUEST",
            "AttributeDefinitions": [{"AttributeName": attribute, "AttributeType": "S"} for attribute in key],
            "KeySchema": [
                {"AttributeName": attribute, "KeyType": kind}
                for attribute, kind in zip(key, ("HASH", "RANGE"), strict=False)
            ],
        }
        answer = self.answer("CreateTable", msgspec.json.encode(body))
        require(answer.status == 200, f"{name}: {answer.body!r}")


def json_answer(status: int, content: Any = None) -> Response:
    """Return an answer in JSON."""
    return Response(status, [], msgspec.json.encode(content or {}))


def failure(code: str, status: int = 400, **more: Any) -> Response:
    """Return an error in DynamoDB's form."""
    return json_answer(
        status, {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "made by the model test", **more}
    )


def actions_of(body: bytes) -> list[dict[str, Any]]:
    """Return the actions of a transaction, without the names of their kinds."""
    return [next(iter(action.values())) for action in msgspec.json.decode(body)["TransactItems"]]


def place_of(action: dict[str, Any]) -> tuple[str, str]:
    """Return the partition key and sort key of an action's item; a transaction's last action is on its receipt."""
    key = action.get("Key") or action["Item"]
    return key["pk"]["S"], key.get("sk", {"S": ""})["S"]


class Recorder:
    """Forwards calls, and keeps the transactions that took effect, in order; `read` decodes an item of the table `records`."""

    def __init__(self, service: Service, *, records: str, read: Callable[[Item], Known]) -> None:
        self._service = service
        self._table = records
        self._read = read
        self._bodies: set[bytes] = set()
        self.commits: list[Commit] = []

    def forget(self) -> None:
        self._service.forget()

    def answer(self, operation: str, body: bytes) -> Response:
        answer = self._service.answer(operation, body)
        # A second success of the same body had no effect: its token answered, else its receipt would have cancelled it.
        if operation == "TransactWriteItems" and answer.status == 200 and body not in self._bodies:
            self._bodies.add(body)
            self.commits.append(self._commit(actions_of(body)))
        return answer

    def _commit(self, actions: Sequence[dict[str, Any]]) -> Commit:
        keys = tuple(
            key for action in actions if action["TableName"] == self._table for key in [_key(action)] * _count(action)
        )
        require("Item" in actions[-1], f"a transaction on {keys} took effect without a receipt")
        receipt = from_item(actions[-1]["Item"])
        request_id, _, lane = receipt["pk"].rpartition("#")
        return Commit(
            request_id=request_id,
            lane=int(lane),
            number=int(receipt["sk"].removeprefix("tx#")),
            keys=keys,
            refused={refusal["index"]: Reason(refusal["reason"]) for refusal in receipt.get("refused", [])},
            records=self._look_up(keys),
        )

    def _look_up(self, keys: Sequence[Key]) -> dict[Key, Known | None]:
        found: dict[Key, Known | None] = dict.fromkeys(keys)
        if keys:
            asked = [{"pk": {"S": f"{entity}#{key}"}} for entity, key in found]
            body = {"RequestItems": {self._table: {"Keys": asked, "ConsistentRead": True}}}
            answer = self._service.answer("BatchGetItem", msgspec.json.encode(body))
            items = msgspec.json.decode(answer.body)["Responses"][self._table]
            found |= {_key_in(item): self._read(item) for item in items}
        return found


def _count(action: dict[str, Any]) -> int:
    """Return how many operations an action applies: it adds a version for each."""
    return int(action.get("ExpressionAttributeValues", {}).get(":count", {"N": "1"})["N"])


def _key(action: dict[str, Any]) -> Key:
    return _key_in(action.get("Key") or action["Item"])


def _key_in(item: Item) -> Key:
    entity, _, key = item["pk"]["S"].partition("#")
    return entity, key
