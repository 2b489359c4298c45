"""Calls to DynamoDB: what is sent, what each response means, and which calls are retried."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore import exactjson
from mdstore.aws.dynamodb.client import DynamoClient, transact
from mdstore.aws.http import SignedHttp
from mdstore.aws.retry import Retry
from mdstore.errors import (
    ConditionFailed,
    DeploymentBroken,
    MdstoreError,
    RequestRejected,
    TransactionCancelled,
    Unavailable,
)
from mdstore.local.emulator import free_port
from tests.unit.endpoint import Endpoint, FakeTime, Keys, Response


def test_delays_double_up_to_the_cap() -> None:
    """The bounds of the jitter are base, 2 x base, 4 x base and so on up to the cap; retries end with the patience."""
    time = FakeTime()

    def call() -> None:
        raise Unavailable("no", code="x")

    with pytest.raises(Unavailable):
        time.retry(base=1.0, cap=5.0, patience=20.0).run(call)
    assert time.slept == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_the_jitter_is_full() -> None:
    """A delay is drawn between 0 and its bound, so that callers spread out."""
    bounds: list[tuple[float, float]] = []
    time = FakeTime()

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high / 2

    calls = iter([Unavailable("no", code="x")] * 4)

    def call() -> str:
        for error in calls:
            raise error
        return "done"

    retry = Retry(base=0.1, cap=0.5, clock=time.clock, sleep=time.sleep, uniform=uniform)
    assert retry.run(call) == "done"
    assert bounds == [(0, 0.1), (0, 0.2), (0, 0.4), (0, 0.5)]
    assert time.slept == [high / 2 for _, high in bounds]


@settings(deadline=None, max_examples=100)
@given(st.floats(0.001, 1), st.floats(0.001, 10), st.floats(0, 60), st.none() | st.floats(0, 60), st.floats(0, 0.5))
def test_retries_never_wait_past_the_deadline(
    base: float, cap: float, patience: float, deadline: float | None, each: float
) -> None:
    """All waiting ends by the deadline, or by the patience if there is none; there is always a first try."""
    time = FakeTime()
    tries = 0

    def call() -> None:
        nonlocal tries
        tries += 1
        time.now += each + 0.01
        raise Unavailable(f"try {tries}", code="x")

    until = 1_000.0 + (patience if deadline is None else deadline)
    with pytest.raises(Unavailable) as caught:
        time.retry(most=False, base=base, cap=cap, patience=patience).run(
            call, deadline=None if deadline is None else until
        )
    assert str(caught.value) == f"x: try {tries}"
    assert tries == len(time.slept) + 1
    assert time.now - each - 0.01 <= until or not time.slept
    assert all(delay <= cap for delay in time.slept)


def test_a_deadline_in_the_past_allows_one_try() -> None:
    """A call is always made once, however late it is."""
    time = FakeTime()
    answers = iter(["first"])
    assert time.retry().run(lambda: next(answers), deadline=0) == "first"


def test_only_unavailable_is_retried() -> None:
    """Other errors are raised at once."""
    time = FakeTime()

    def call() -> None:
        raise DeploymentBroken("no table", code="x")

    with pytest.raises(DeploymentBroken):
        time.retry().run(call)
    assert time.slept == []


@pytest.fixture
def client(endpoint: Endpoint, time: FakeTime) -> Iterator[DynamoClient]:
    http = SignedHttp(service="dynamodb", region="eu-central-1", credentials=Keys())
    found = DynamoClient(http=http, endpoint=endpoint.url, retry=time.retry(base=1, patience=5))
    yield found
    found.close()


def error_body(code: str, **more: Any) -> dict[str, Any]:
    return {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "text", **more}


def failure(client: DynamoClient, endpoint: Endpoint, *answers: tuple[int, Any] | Response) -> MdstoreError:
    endpoint.respond_with(*answers)
    with pytest.raises(MdstoreError) as caught:
        client.call("GetItem", {})
    return caught.value


def test_a_call_is_signed_json(client: DynamoClient, endpoint: Endpoint) -> None:
    """The request has DynamoDB's headers and a SigV4 signature with the session token, and the response is decoded."""
    endpoint.respond_with((200, {"Item": {"pk": {"S": "ü"}}}))
    assert client.call("GetItem", {"TableName": "t"}) == {"Item": {"pk": {"S": "ü"}}}
    ((headers, body),) = endpoint.requests
    assert json.loads(body) == {"TableName": "t"}
    assert headers["content-type"] == "application/x-amz-json-1.0"
    assert headers["x-amz-target"] == "DynamoDB_20120810.GetItem"
    assert headers["x-amz-security-token"] == "session-token"
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/")
    assert "/eu-central-1/dynamodb/aws4_request" in headers["authorization"]


RETRYABLE = [
    (400, "ProvisionedThroughputExceededException"),
    (400, "ThrottlingException"),
    (400, "RequestLimitExceeded"),
    (400, "TransactionConflictException"),
    (400, "TransactionInProgressException"),
    (500, "InternalServerError"),
    (503, "ServiceUnavailable"),
    (500, "SomethingNew"),
]


@pytest.mark.parametrize(("status", "code"), RETRYABLE)
def test_retryable_errors_raise_unavailable(client: DynamoClient, endpoint: Endpoint, status: int, code: str) -> None:
    """Throttles, conflicts and any HTTP 5xx are retried until the patience is used up; the error names their code."""
    error = failure(client, endpoint, (status, error_body(code)))
    assert isinstance(error, Unavailable)
    assert error.code == code
    assert str(error) == f"{code}: GetItem: text"
    assert len(endpoint.requests) == 3  # tries after 0, 1 and 3 s; the patience is 5 s


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ValidationException", RequestRejected),
        ("SerializationException", RequestRejected),
        ("IdempotentParameterMismatchException", RequestRejected),
        ("ItemCollectionSizeLimitExceededException", RequestRejected),
        ("ResourceNotFoundException", DeploymentBroken),
        ("AccessDeniedException", DeploymentBroken),
        ("UnrecognizedClientException", DeploymentBroken),
        ("ExpiredTokenException", DeploymentBroken),
        ("SomethingNew", DeploymentBroken),
    ],
)
def test_permanent_errors_are_not_retried(
    client: DynamoClient, endpoint: Endpoint, code: str, kind: type[RequestRejected | DeploymentBroken]
) -> None:
    """Malformed calls and broken deployments raise different errors, which name their code."""
    error = failure(client, endpoint, (400, error_body(code)))
    assert type(error) is kind
    assert error.code == code
    assert len(endpoint.requests) == 1


def test_a_failed_condition_raises_condition_failed(client: DynamoClient, endpoint: Endpoint) -> None:
    """The condition of a single write has an error of its own, and is not retried."""
    error = failure(client, endpoint, (400, error_body("ConditionalCheckFailedException")))
    assert type(error) is ConditionFailed
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        ((502, b"<html>bad gateway</html>"), Unavailable, "HTTP502"),
        ((503, b""), Unavailable, "HTTP503"),
        ((500, b"[]"), Unavailable, "HTTP500"),
        ((500, b"\xff"), Unavailable, "HTTP500"),
        ((403, b"<html>go away</html>"), DeploymentBroken, "HTTP403"),
        ((400, b"{}"), DeploymentBroken, "HTTP400"),
    ],
)
def test_a_response_without_a_code_is_judged_by_its_status(
    client: DynamoClient, endpoint: Endpoint, answer: tuple[int, bytes], kind: type[MdstoreError], code: str
) -> None:
    """A proxy's HTML page is judged by its HTTP status."""
    error = failure(client, endpoint, answer)
    assert type(error) is kind
    assert getattr(error, "code", None) == code


def test_a_success_that_is_not_json_is_unavailable(client: DynamoClient, endpoint: Endpoint) -> None:
    """It is unknown whether the call took effect, so the same call is made again later."""
    assert isinstance(failure(client, endpoint, (200, b"<html>login please</html>")), Unavailable)


@pytest.mark.parametrize(
    "codes",
    [
        ["TransactionConflict"],
        ["None", "TransactionConflict", "None"],
        ["ThrottlingError", "ProvisionedThroughputExceeded", "TransactionConflict"],
        ["None"],
        [],
    ],
)
def test_a_transaction_cancelled_by_contention_is_unavailable(
    client: DynamoClient, endpoint: Endpoint, codes: list[str]
) -> None:
    """Cancellation reasons that do not concern the operations are temporary."""
    reasons = [{"Code": code} for code in codes]
    error = failure(client, endpoint, (400, error_body("TransactionCanceledException", CancellationReasons=reasons)))
    assert isinstance(error, Unavailable)
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    "codes",
    [
        ["ConditionalCheckFailed"],
        ["TransactionConflict", "ConditionalCheckFailed", "None"],
        ["ValidationError", "None"],
        ["ThrottlingError", "SomethingNew"],
    ],
)
def test_a_transaction_cancelled_for_its_operations_has_their_reasons(
    client: DynamoClient, endpoint: Endpoint, codes: list[str]
) -> None:
    """One reason that concerns an operation is enough; the error has the reason of each action, in order, with its old item."""
    reasons = [{"Code": code, "Message": "m", "Item": {"pk": {"S": "x"}}} for code in codes]
    error = failure(client, endpoint, (400, error_body("TransactionCanceledException", CancellationReasons=reasons)))
    assert isinstance(error, TransactionCancelled)
    assert error.reasons == reasons
    assert len(endpoint.requests) == 1


def test_every_try_sends_the_same_bytes_and_token(client: DynamoClient, endpoint: Endpoint, time: FakeTime) -> None:
    """A transaction is retried unchanged, so that DynamoDB recognises it."""
    endpoint.respond_with(
        (500, error_body("InternalServerError")),
        (0, b""),
        (400, error_body("TransactionInProgressException")),
        (200, {}),
    )
    actions = exactjson.dumps([{"Put": {"TableName": "t", "Item": {"pk": {"S": "ü"}}}}])
    client.call(*transact(actions), deadline=time.now + 60)
    bodies = [body for _, body in endpoint.requests]
    assert len(bodies) == 4
    assert len(set(bodies)) == 1
    sent = json.loads(bodies[0])
    assert sent["TransactItems"] == [{"Put": {"TableName": "t", "Item": {"pk": {"S": "ü"}}}}]
    assert 1 <= len(sent["ClientRequestToken"]) <= 36
    assert time.slept == [1, 2]  # if a reused connection turns out to be closed, libcurl opens a new one at once


def test_other_actions_have_another_token(client: DynamoClient, endpoint: Endpoint) -> None:
    """The token is derived from the actions: the same actions have the same token, and others have another."""
    endpoint.respond_with((200, {}))
    for name in ("a", "b", "a"):
        client.call(*transact(exactjson.dumps([{"Delete": {"TableName": name}}])))
    first, second, third = (json.loads(body)["ClientRequestToken"] for _, body in endpoint.requests)
    assert first == third != second


def test_a_damaged_response_is_unavailable(client: DynamoClient, endpoint: Endpoint) -> None:
    """A response with a wrong checksum is not used, whether it reports success or an error; one with the right checksum is."""
    good = b'{"Item":{}}'
    for status, content in ((200, good), (400, json.dumps(error_body("ValidationException")).encode())):
        error = failure(client, endpoint, (status, content, {"x-amz-crc32": str(zlib.crc32(content) ^ 1)}))
        assert isinstance(error, Unavailable)
        assert error.code == "ChecksumMismatch"
    endpoint.respond_with((200, b"{}", {"x-amz-crc32": "1"}), (200, good, {"x-amz-crc32": str(zlib.crc32(good))}))
    assert client.call("GetItem", {}) == {"Item": {}}


def test_a_broken_connection_is_unavailable(client: DynamoClient, endpoint: Endpoint) -> None:
    """With no response, or half of one, the call may have taken effect, so the same call is made again later."""
    assert isinstance(failure(client, endpoint, (0, b"")), Unavailable)
    assert isinstance(
        failure(client, endpoint, (200, b"{", {"Content-Length": "10", "Connection": "close"})), Unavailable
    )


def test_a_refused_connection_is_unavailable(time: FakeTime) -> None:
    """It is retried like a throttle, and raises the same error."""
    http = SignedHttp(service="dynamodb", region="x", credentials=Keys())
    client = DynamoClient(http=http, endpoint=f"http://127.0.0.1:{free_port()}", retry=time.retry(base=1))
    with pytest.raises(Unavailable):
        client.call("GetItem", {})
    assert time.slept
    client.close()
