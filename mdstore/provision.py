"""Makes what the store needs in AWS: bucket, queues, tables. Safe to repeat; nothing that exists is emptied or replaced.

Names, times and limits are the settings'; where a team has its infrastructure as code, this shows what it must hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from mdstore.aws import Aws, translated
from mdstore.model import MAX_AGE
from mdstore.settings import Settings

_RETENTION = str(MAX_AGE)


def provision(settings: Settings) -> Iterator[tuple[str, str, bool]]:
    """Create what is missing; yields `(kind, name, created)` as it goes. Raises `Unavailable` or `DeploymentBroken`."""
    with translated("provision"):
        yield from _steps(Aws(settings), settings)


def _steps(aws: Aws, settings: Settings) -> Iterator[tuple[str, str, bool]]:
    yield "bucket", settings.bucket, _bucket(aws, settings)
    for queue, created in _queues(aws, settings):
        yield "queue", queue, created
    key = [("pk", "HASH")]
    yield "table", settings.records_table, _table(aws, settings.records_table, key, ttl="expires_at")
    yield "table", settings.ledger_table, _table(aws, settings.ledger_table, [*key, ("sk", "RANGE")], ttl="expires_at")
    yield "table", settings.results_table, _table(aws, settings.results_table, [("id", "HASH")], ttl="ttl")


def _bucket(aws: Aws, settings: Settings) -> bool:
    try:
        aws.s3.head_bucket(Bucket=settings.bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
    else:
        return False
    place: dict[str, Any] = {}
    if settings.region != "us-east-1":
        place["CreateBucketConfiguration"] = {"LocationConstraint": settings.region}
    aws.s3.create_bucket(Bucket=settings.bucket, **place)
    closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    aws.s3.put_public_access_block(
        Bucket=settings.bucket,
        PublicAccessBlockConfiguration=dict.fromkeys(closed, True),  # type: ignore[arg-type]
    )
    return True


def _queues(aws: Aws, settings: Settings) -> Iterator[tuple[str, bool]]:
    url, created = _queue(aws, settings.dead_letter_queue, {"MessageRetentionPeriod": _RETENTION})
    yield settings.dead_letter_queue, created
    arn = aws.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": str(settings.max_receives)})
    attributes = {
        "VisibilityTimeout": str(settings.visibility_timeout),
        "MessageRetentionPeriod": _RETENTION,
        "RedrivePolicy": redrive,
    }
    yield settings.queue, _queue(aws, settings.queue, attributes)[1]


def _queue(aws: Aws, name: str, attributes: dict[str, str]) -> tuple[str, bool]:
    try:
        url = aws.sqs.get_queue_url(QueueName=name)["QueueUrl"]
    except ClientError as error:
        if "NonExistentQueue" not in error.response["Error"]["Code"] and "QueueDoesNotExist" not in str(error):
            raise
        return aws.sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"], True  # type: ignore[arg-type]
    aws.sqs.set_queue_attributes(QueueUrl=url, Attributes=attributes)  # type: ignore[arg-type]
    return url, False


def _table(aws: Aws, name: str, key: list[tuple[str, Any]], *, ttl: str) -> bool:
    client = aws.dynamodb
    created = True
    try:
        client.create_table(
            TableName=name,
            BillingMode="PAY_PER_REQUEST",
            AttributeDefinitions=[{"AttributeName": attribute, "AttributeType": "S"} for attribute, _ in key],
            KeySchema=[{"AttributeName": attribute, "KeyType": kind} for attribute, kind in key],
        )
    except client.exceptions.ResourceInUseException:
        created = False
    client.get_waiter("table_exists").wait(TableName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 120})
    current = client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
    if current.get("TimeToLiveStatus") not in ("ENABLED", "ENABLING"):
        client.update_time_to_live(TableName=name, TimeToLiveSpecification={"Enabled": True, "AttributeName": ttl})
    return created
