"""The speed of the stand-in for AWS itself: calls that one core can answer, made by clients that take little CPU."""

from __future__ import annotations

from benchmarks.growth import tree_cpu
from benchmarks.load import NUMBER, Order, http_call, make_calls
from benchmarks.records import RECORD
from benchmarks.results import Row
from benchmarks.services import server
from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import to_item
from mdstore.provision import provision
from mdstore.settings import Settings, load_settings

_CLIENTS = 32
#: As long as the headers of a signature, which the stand-in does not check.
_SIGNED = {
    "authorization": "AWS4-HMAC-SHA256 " + "x" * 190,
    "x_amz_date": "20260101T000000Z",
    "x_amz_content_sha256": "0" * 64,
}


def rows(count: int) -> list[Row]:
    """Measure."""
    found: list[Row] = []
    with server("benchmarks.memory_aws", "0") as aws:
        settings = load_settings({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{aws.port}"}).settings
        for _ in provision(settings):
            pass
        for name, call in _calls(settings).items():
            before = tree_cpu(aws.pid)
            answers = make_calls(Order(port=aws.port, clients=_CLIENTS, call=call, calls=count), expected=200)
            cpu = tree_cpu(aws.pid) - before
            found.append({"call": name, "calls_per_s": answers.rate, "calls_per_s_of_cpu": count / cpu})
    return found


def _calls(settings: Settings) -> dict[str, str]:
    """Return calls as this project makes them for requests of one operation, by name."""
    key, version = f"bench#small-{NUMBER}", {"version": 1, "updated_by": NUMBER}
    record = to_item({"pk": key, "entity": "bench", "key": key, "data": RECORD, **version})
    receipt = to_item({"pk": f"{NUMBER}#00000", "sk": "tx#00000", "refused": [], "expires_at": 1_764_000_000})
    request = to_item({"pk": NUMBER, "sk": "request", "state": "completed", "expires_at": 1_764_000_000, **version})
    record_put, receipt_put, request_put = (
        {"TableName": table, "Item": item, "ConditionExpression": "attribute_not_exists(pk)"}
        for table, item in (
            (settings.records_table, record),
            (settings.ledger_table, receipt),
            (settings.ledger_table, request),
        )
    )
    transaction = {"TransactItems": [{"Put": record_put}, {"Put": receipt_put}]}
    read = {"TableName": settings.records_table, "Key": {"pk": {"S": key}}, "ConsistentRead": True}
    queue = {"QueueUrl": f"{settings.endpoint_url}/000000000000/{settings.queue}"}
    return {
        "S3 put": http_call("PUT", f"/{settings.bucket}/payloads/{NUMBER}", "x" * 400, **_SIGNED),
        "S3 get": http_call("GET", f"/{settings.bucket}/payloads/{NUMBER}", **_SIGNED),
        "SQS send": _json_call("AmazonSQS.SendMessage", {**queue, "MessageBody": "x" * 600}),
        "SQS receive": _json_call("AmazonSQS.ReceiveMessage", {**queue, "MaxNumberOfMessages": 1}),
        "DynamoDB put": _json_call("DynamoDB_20120810.PutItem", request_put),
        "DynamoDB transaction of 2": _json_call("DynamoDB_20120810.TransactWriteItems", transaction),
        "DynamoDB get": _json_call("DynamoDB_20120810.GetItem", read),
    }


def _json_call(target: str, body: object) -> str:
    headers = {"x_amz_target": target, "content_type": "application/x-amz-json-1.0", **_SIGNED}
    return http_call("POST", "/", exactjson.dumps(body).decode(), **headers)
