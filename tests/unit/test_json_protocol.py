"""AWS's JSON protocol: how a call names its operation, and what is read from an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mdstore.aws.http import Response
from mdstore.aws.json_protocol import Failure, JsonProtocol, failure


@pytest.mark.parametrize(
    "endpoint", ["https://sqs.eu-central-1.amazonaws.com", "https://sqs.eu-central-1.amazonaws.com/"]
)
def test_a_call_names_its_operation_in_a_header(endpoint: str) -> None:
    """Any body is posted to the service's root."""
    url, headers, body = JsonProtocol(endpoint=endpoint, target="AmazonSQS").request("SendMessage", b'{"a":"\xc3\xbc"}')
    assert url == "https://sqs.eu-central-1.amazonaws.com/"
    assert sorted(headers) == ["Content-Type: application/x-amz-json-1.0", "X-Amz-Target: AmazonSQS.SendMessage"]
    assert body == b'{"a":"\xc3\xbc"}'


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "gone"}, "QueueDoesNotExist", "gone"),
        ({"__type": "com.amazon.coral.service#X", "Message": "capital"}, "X", "capital"),
        ({"__type": "NoPrefix", "message": "m"}, "NoPrefix", "m"),
        ({"__type": "a#X"}, "X", "no message"),
        ({"__type": "a#X", "message": None, "Message": ""}, "X", "no message"),
    ],
)
def test_an_error_has_a_code_and_a_message(body: dict[str, Any], code: str, message: str) -> None:
    """The code may have a prefix, and the message one of two names or none. The whole body is kept."""
    assert failure("Op", Response(400, [], json.dumps(body).encode())) == Failure(code, f"Op: {message}", body)


@pytest.mark.parametrize(
    "body", [b"", b"<html>bad gateway</html>", b"[]", b"7", b"null", b"{}", b'"x"', b"\xff", b'{"message":"m"}']
)
def test_a_response_that_is_not_an_aws_error_is_judged_by_its_status(body: bytes) -> None:
    """It may come from a proxy, which has no error codes."""
    assert failure("Op", Response(502, [], body)) == Failure("HTTP502", "Op: no message", {})
