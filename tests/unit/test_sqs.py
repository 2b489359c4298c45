"""Messages over signed calls: batches, the result of each entry, and what each response means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import md5
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.http import SignedHttp
from mdstore.aws.sqs import MAX_BYTES, MAX_ENTRIES, Entry, Failed, Sqs, spans
from mdstore.errors import DeploymentBroken, MdstoreError, Unavailable
from tests.unit.endpoint import Endpoint, FakeTime, Keys

QUEUE = "https://sqs.eu-central-1.amazonaws.com/123456789012/mdstore"


@pytest.fixture
def sqs(endpoint: Endpoint, time: FakeTime) -> Iterator[Sqs]:
    http = SignedHttp(service="sqs", region="eu-central-1", credentials=Keys())
    yield Sqs(http=http, endpoint=endpoint.url, retry=time.retry(base=1, patience=5))
    http.close()


def entry(body: str = "x", **more: Any) -> Entry:
    return Entry(message_body=body, **more)


def attribute(text: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": text}


def error_body(code: str) -> dict[str, Any]:
    return {"__type": f"com.amazonaws.sqs#{code}", "message": "text"}


def accepted(*bodies: str) -> dict[str, Any]:
    """Return SQS's response to a batch of which it accepted every entry."""
    return {
        "Successful": [
            {
                "Id": str(at),
                "MessageId": f"m{at}",
                "MD5OfMessageBody": md5(body.encode(), usedforsecurity=False).hexdigest(),
            }
            for at, body in enumerate(bodies)
        ]
    }


def batches(entries: list[Entry]) -> list[list[Entry]]:
    """Return the entries of each call."""
    return [[entries[at] for at in span] for span in spans(entries)]


# -- batches


@pytest.mark.parametrize(
    ("one", "size"),
    [
        (entry(""), 0),
        (entry("abc"), 3),
        (entry("üü€😀"), 2 + 2 + 3 + 4),
        (entry("abc", message_attributes={"näme": attribute("ü")}), 3 + 5 + len("String") + 2),
        (entry("abc", message_attributes={"a": attribute("b"), "c": attribute("d")}), 3 + 2 * (1 + len("String") + 1)),
        (entry("abc", delay_seconds=900, message_group_id="group", message_deduplication_id="id"), 3),
    ],
)
def test_a_size_is_counted_as_sqs_counts_it(one: Entry, size: int) -> None:
    """SQS counts the body in UTF-8, and the name, type and value of each attribute, and nothing else."""
    assert one.size == size


SIZES = st.lists(
    st.sampled_from([0, 1, 100, MAX_BYTES // 10, MAX_BYTES // 10 + 1, MAX_BYTES // 2, MAX_BYTES - 1, MAX_BYTES])
    | st.integers(0, MAX_BYTES),
    max_size=40,
)


@settings(deadline=None, max_examples=100)
@given(SIZES)
def test_batches_are_full_and_within_the_limits_of_a_call(sizes: list[int]) -> None:
    """Batches keep the order, have at most 10 entries and 1 MiB, and have as many entries as fit."""
    whole = "x" * MAX_BYTES
    entries = [entry(whole[:size]) for size in sizes]
    cut = batches(entries)
    assert [one for batch in cut for one in batch] == entries
    assert all(0 < len(batch) <= 10 and sum(one.size for one in batch) <= 2**20 for batch in cut)
    for batch, following in pairwise(cut):
        assert len(batch) == 10 or sum(one.size for one in batch) + following[0].size > 2**20


def test_ten_entries_are_a_batch_and_the_eleventh_begins_another() -> None:
    """21 small entries are batches of 10, 10 and 1."""
    assert [len(batch) for batch in batches([entry(str(n)) for n in range(21)])] == [10, 10, 1]
    assert MAX_ENTRIES == 10


def test_a_mebibyte_is_a_batch_and_a_byte_more_begins_another() -> None:
    """The bytes of all bodies and attributes count."""
    half = "x" * 2**19
    assert [len(batch) for batch in batches([entry(half), entry(half), entry("")])] == [3]
    assert [len(batch) for batch in batches([entry(half), entry(half + "x")])] == [1, 1]
    assert [len(batch) for batch in batches([entry("ü" * 2**18), entry(half), entry("x")])] == [2, 1]
    labelled = entry(half, message_attributes={"a": attribute("")})
    assert [len(batch) for batch in batches([labelled, entry(half)])] == [1, 1]


def test_an_entry_that_fits_no_batch_is_a_batch_of_its_own() -> None:
    """SQS refuses it, and the entries beside it are sent."""
    large = entry("x" * (MAX_BYTES + 1))
    assert [len(batch) for batch in batches([large, entry("a"), large, entry("b")])] == [1, 1, 1, 1]


def test_no_entries_make_no_batch() -> None:
    """Nothing is sent for an empty list."""
    assert batches([]) == []


# -- sending


def test_a_batch_is_sent_with_the_field_names_of_the_api(endpoint: Endpoint, sqs: Sqs) -> None:
    """Fields that are not set are left out. SQS refuses a delay on a FIFO queue, for example, even if it is null."""
    endpoint.respond_with((200, accepted("ü", "b")))
    full = entry(
        "b",
        delay_seconds=5,
        message_group_id="g",
        message_deduplication_id="d",
        message_attributes={"reason": attribute("r")},
    )
    assert sqs.send(QUEUE, [entry("ü"), full]) == [None, None]
    ((headers, body),) = endpoint.requests
    assert json.loads(body) == {
        "QueueUrl": QUEUE,
        "Entries": [
            {"Id": "0", "MessageBody": "ü"},
            {
                "Id": "1",
                "MessageBody": "b",
                "DelaySeconds": 5,
                "MessageGroupId": "g",
                "MessageDeduplicationId": "d",
                "MessageAttributes": {"reason": {"DataType": "String", "StringValue": "r"}},
            },
        ],
    }
    assert headers["x-amz-target"] == "AmazonSQS.SendMessageBatch"
    assert headers["content-type"] == "application/x-amz-json-1.0"
    assert "/eu-central-1/sqs/aws4_request" in headers["authorization"]


def test_entries_that_sqs_did_not_accept_are_retried_alone(endpoint: Endpoint, sqs: Sqs) -> None:
    """They are matched by id, in any order. An entry that would fail again is not retried, and its failure is returned."""
    answer = accepted("a", "b", "c", "d")
    answer["Successful"] = [answer["Successful"][2], answer["Successful"][0]]
    wrong = {"Id": "3", "Code": "InvalidMessageContents", "Message": "no", "SenderFault": True}
    answer["Failed"] = [wrong, {"Id": "1", "Code": "InternalError", "SenderFault": False}]
    endpoint.respond_with((200, answer), (200, {"Successful": [{"Id": "1", "MessageId": "m"}]}))
    assert sqs.send(QUEUE, [entry(body) for body in "abcd"]) == [
        None,
        None,
        None,
        Failed(id="3", code="InvalidMessageContents", sender_fault=True, message="no"),
    ]
    assert [[one["Id"] for one in json.loads(body)["Entries"]] for _, body in endpoint.requests] == [
        ["0", "1", "2", "3"],
        ["1"],
    ]


def test_an_entry_that_keeps_failing_is_returned_as_failed(endpoint: Endpoint, sqs: Sqs, time: FakeTime) -> None:
    """It is retried until the patience ends, and the other entries are sent once."""
    busy = {"Id": "1", "Code": "InternalError", "Message": "busy", "SenderFault": False}
    endpoint.respond_with((200, {**accepted("a"), "Failed": [busy]}), (200, {"Failed": [busy]}))
    assert sqs.send(QUEUE, [entry("a"), entry("b")]) == [None, Failed(id="1", code="InternalError", message="busy")]
    assert time.slept == [1, 2]
    assert len(endpoint.requests) == 4


def test_a_batch_that_failed_completely_is_retried_whole(endpoint: Endpoint, sqs: Sqs, time: FakeTime) -> None:
    """SQS is busy, and ten calls instead of one would add to its load."""
    busy = [{"Id": str(at), "Code": "InternalError", "SenderFault": False} for at in range(2)]
    endpoint.respond_with((200, {"Failed": busy}), (200, accepted("a", "b")))
    assert sqs.send(QUEUE, [entry("a"), entry("b")]) == [None, None]
    assert time.slept == [1]


def test_each_batch_is_a_call(endpoint: Endpoint, sqs: Sqs) -> None:
    """25 entries take three calls. Each entry gets its own result, whichever call completes first."""
    sent = [entry("same") for _ in range(25)]
    answer = {"Successful": [{"Id": str(at), "MessageId": "m"} for at in range(25)]}
    endpoint.respond_with((200, answer))
    assert sqs.send(QUEUE, sent) == [None] * 25
    assert sorted(len(json.loads(body)["Entries"]) for _, body in endpoint.requests) == [5, 10, 10]


def test_deletes_and_visibility_changes_are_batched_too(endpoint: Endpoint, sqs: Sqs) -> None:
    """Each entry has its receipt handle, and a visibility change has its timeout."""
    endpoint.respond_with((200, {"Successful": [{"Id": "0"}, {"Id": "1"}]}))
    assert sqs.delete(QUEUE, ["a", "b"]) == [None, None]
    assert sqs.change_visibility(QUEUE, [("a", 0), ("b", 30)]) == [None, None]
    (first, deleted), (second, changed) = endpoint.requests
    assert first["x-amz-target"] == "AmazonSQS.DeleteMessageBatch"
    assert json.loads(deleted)["Entries"] == [{"Id": "0", "ReceiptHandle": "a"}, {"Id": "1", "ReceiptHandle": "b"}]
    assert second["x-amz-target"] == "AmazonSQS.ChangeMessageVisibilityBatch"
    assert json.loads(changed)["Entries"][1] == {"Id": "1", "ReceiptHandle": "b", "VisibilityTimeout": 30}


def test_a_message_damaged_in_transit_counts_as_not_sent(endpoint: Endpoint, sqs: Sqs) -> None:
    """SQS returns the MD5 of each body that it received; another MD5 means another message."""
    endpoint.respond_with((200, accepted("a", "other")))
    fine, damaged = sqs.send(QUEUE, [entry("a"), entry("b")])
    assert fine is None
    assert damaged is not None
    assert damaged.code == "ChecksumMismatch"


def test_an_entry_without_an_md5_counts_as_sent(endpoint: Endpoint, sqs: Sqs) -> None:
    """Not every service with this protocol returns the MD5."""
    endpoint.respond_with((200, {"Successful": [{"Id": "0", "MessageId": "m"}]}))
    assert sqs.send(QUEUE, [entry("a")]) == [None]


def test_an_entry_missing_from_the_response_counts_as_not_sent(endpoint: Endpoint, sqs: Sqs) -> None:
    """An entry is reported as sent only if the response says so."""
    endpoint.respond_with((200, accepted("a")))
    fine, unknown = sqs.send(QUEUE, [entry("a"), entry("b")])
    assert fine is None
    assert unknown is not None


def test_messages_are_received_with_their_receive_counts(endpoint: Endpoint, sqs: Sqs) -> None:
    """A receive is one call, and may return no messages."""
    message = {
        "MessageId": "m",
        "ReceiptHandle": "r",
        "Body": "b",
        "Attributes": {"ApproximateReceiveCount": "3", "SentTimestamp": "1500"},
    }
    endpoint.respond_with((200, {"Messages": [message, {**message, "Attributes": {}}]}), (200, {}))
    counted, uncounted = sqs.receive(QUEUE, 7, wait=20, visibility=60)
    assert (counted.message_id, counted.receipt_handle, counted.body, counted.receives) == ("m", "r", "b", 3)
    assert counted.sent_at == 1.5
    assert uncounted.receives == 1
    assert sqs.receive(QUEUE, 7, wait=20, visibility=60) == []
    assert json.loads(endpoint.requests[0][1]) == {
        "QueueUrl": QUEUE,
        "MaxNumberOfMessages": 7,
        "WaitTimeSeconds": 20,
        "VisibilityTimeout": 60,
        "AttributeNames": ["ApproximateReceiveCount", "SentTimestamp"],
    }


def test_the_url_of_a_queue_is_looked_up_once(endpoint: Endpoint, sqs: Sqs) -> None:
    """It does not change while the queue exists."""
    endpoint.respond_with((200, {"QueueUrl": QUEUE}))
    assert [sqs.url("mdstore"), sqs.url("mdstore")] == [QUEUE, QUEUE]
    assert len(endpoint.requests) == 1


def test_the_error_of_a_missing_queue_names_it(endpoint: Endpoint, sqs: Sqs) -> None:
    """It also names the command that creates the queue, which the caller has probably not run."""
    endpoint.respond_with((400, {"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "no"}))
    with pytest.raises(DeploymentBroken, match="there is no queue 'mdstore'; mdstore provision makes"):
        sqs.url("mdstore")


# -- responses

RETRYABLE = [
    (400, "RequestThrottled"),
    (400, "ThrottlingException"),
    (400, "OverLimit"),
    (400, "KmsThrottled"),
    (400, "RequestTimeout"),
    (403, "RequestThrottled"),
    (500, "InternalFailure"),
    (503, "ServiceUnavailable"),
    (500, "SomethingNew"),
]


@pytest.mark.parametrize(("status", "code"), RETRYABLE)
def test_retryable_errors_are_retried_until_the_patience_ends(
    endpoint: Endpoint, sqs: Sqs, time: FakeTime, status: int, code: str
) -> None:
    """Throttles and any 5xx are retried with the same bytes; the last error names its code."""
    endpoint.respond_with((status, error_body(code)))
    with pytest.raises(Unavailable) as caught:
        sqs.call("PurgeQueue", {"QueueUrl": QUEUE})
    assert caught.value.code == code
    assert str(caught.value) == f"{code}: PurgeQueue: text"
    assert time.slept == [1, 2]
    assert len({body for _, body in endpoint.requests}) == 1
    assert len(endpoint.requests) == 3


def test_a_send_succeeds_after_temporary_failures(endpoint: Endpoint, sqs: Sqs, time: FakeTime) -> None:
    """The caller does not notice a throttle or a broken connection that was temporary."""
    endpoint.respond_with(
        (400, error_body("RequestThrottled")), (0, b""), (502, b"<html></html>"), (200, accepted("x"))
    )
    assert sqs.send(QUEUE, [entry()]) == [None]
    assert time.slept == [1, 2]  # libcurl itself replaces a reused connection that was closed


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "QueueDoesNotExist"),
        (400, "AccessDeniedException"),
        (400, "BatchRequestTooLong"),
        (403, "InvalidClientTokenId"),
        (400, "SomethingNew"),
        (403, "HTTP403"),
    ],
)
def test_permanent_errors_raise_deployment_broken(
    endpoint: Endpoint, sqs: Sqs, time: FakeTime, status: int, code: str
) -> None:
    """A missing queue or permission, or a malformed call, is not retried, and the error names its code."""
    endpoint.respond_with((status, b"<html>go away</html>" if code == "HTTP403" else error_body(code)))
    with pytest.raises(MdstoreError) as caught:
        sqs.call("ReceiveMessage", {"QueueUrl": QUEUE})
    assert type(caught.value) is DeploymentBroken
    assert caught.value.code == code
    assert time.slept == []
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "sender_fault"), [(503, "ServiceUnavailable", False), (400, "QueueDoesNotExist", True)]
)
def test_a_batch_whose_call_fails_is_not_sent(
    endpoint: Endpoint, sqs: Sqs, status: int, code: str, sender_fault: bool
) -> None:
    """Each of its entries has the reason, and whether the same entry would fail again."""
    endpoint.respond_with((status, error_body(code)))
    for failed in sqs.send(QUEUE, [entry()] * 12):
        assert failed is not None
        assert (failed.code, failed.sender_fault) == (code, sender_fault)


def test_any_operation_can_be_called_by_name(endpoint: Endpoint, sqs: Sqs) -> None:
    """The response is decoded, and an empty body becomes an empty dict."""
    endpoint.respond_with((200, {"Messages": [{"Body": "ü"}]}), (200, b""))
    assert sqs.call("ReceiveMessage", {"QueueUrl": QUEUE}) == {"Messages": [{"Body": "ü"}]}
    assert sqs.call("DeleteMessage", {"QueueUrl": QUEUE, "ReceiptHandle": "r"}) == {}
    assert [headers["x-amz-target"] for headers, _ in endpoint.requests] == [
        "AmazonSQS.ReceiveMessage",
        "AmazonSQS.DeleteMessage",
    ]


def test_a_success_that_is_not_json_is_unavailable(endpoint: Endpoint, sqs: Sqs) -> None:
    """It is unknown whether the call took effect, so the same call is made again later."""
    endpoint.respond_with((200, b"<html>login please</html>"))
    with pytest.raises(Unavailable) as caught:
        sqs.call("ReceiveMessage", {})
    assert caught.value.code == "NoAnswer"
    assert len(endpoint.requests) == 3
