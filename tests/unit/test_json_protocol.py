"""AWS's JSON protocol: how a call is named, and what is read of an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mdstore.aws.http import Answer
from mdstore.aws.json_protocol import Failure, JsonProtocol, failure


@pytest.mark.parametrize(
    "endpoint", ["https://sqs.eu-central-1.amazonaws.com", "https://sqs.eu-central-1.amazonaws.com/"]
)
def test_a_call_names_its_operation_in_a_header(endpoint: str) -> None:
    """It is posted to the service's root, whatever the body."""
    url, headers, body = JsonProtocol(endpoint=endpoint, target="AmazonSQS").request("SendMessage", b'{"a":"\xc3\xbc"}')
    assert url == "https://sqs.eu-central-1.amazonaws.com/"
    assert sorted(headers) == ["Content-Type: application/x-amz-json-1.0", "X-Amz-Target: AmazonSQS.SendMessage"]
    assert body == b'{"a":"\xc3\xbc"}'


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "gone"}, "QueueDoesNotExist", "gone"),
        ({"__type": "com.amazon.coral.service#X", "Message": "capital"}, "X", "capital"),
        ({"__type": "NoPrefix", "message": "m"}, "NoPrefix", "m"),
        ({"__type": "a#X"}, "X", "no message"),
        ({"__type": "a#X", "message": None, "Message": ""}, "X", "no message"),
    ],
)
def test_an_error_names_its_code_and_says_it_in_words(body: dict[str, Any], code: str, words: str) -> None:
    """The code comes with or without a prefix, the words under either name, or not at all; the whole body is kept."""
    assert failure("Op", Answer(400, [], json.dumps(body).encode())) == Failure(code, f"Op: {words}", body)


@pytest.mark.parametrize(
    "body", [b"", b"<html>bad gateway</html>", b"[]", b"7", b"null", b"{}", b'"x"', b"\xff", b'{"message":"m"}']
)
def test_an_answer_of_something_else_goes_by_its_status(body: bytes) -> None:
    """A proxy between knows nothing of codes."""
    assert failure("Op", Answer(502, [], body)) == Failure("HTTP502", "Op: no message", {})
