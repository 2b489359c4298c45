"""Create the AWS resources of a deployment: bucket, lifecycle rules, queues, topics and tables.

Provisioning can be repeated safely: it never empties or replaces an existing resource. Names, times and limits come from the
settings. Teams that manage infrastructure as code can use this module as the list of resources to define.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from secrets import token_hex
from typing import Any

from botocore.exceptions import ClientError

from mdstore.aws.boto import boto_errors, error_code
from mdstore.aws.clients import AwsClients
from mdstore.aws.sqs import is_fifo, is_gone
from mdstore.errors import ConfigurationError
from mdstore.model import CLAIM_DAYS, MAX_AGE, OPEN_INDEX
from mdstore.settings import Settings

_RETENTION = str(MAX_AGE)
_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo")
_ITEM_KEY = [("pk", "HASH"), ("sk", "RANGE")]
#: The index of chords whose callback was not published yet. An item is in it as long as it has the attribute `open`.
OPEN_KEYS = (("open", "S"), ("look_at", "N"))
OPEN: dict[str, Any] = {
    "IndexName": OPEN_INDEX,
    "KeySchema": [
        {"AttributeName": "open", "KeyType": "HASH"},
        {"AttributeName": "look_at", "KeyType": "RANGE"},
    ],
    "Projection": {"ProjectionType": "KEYS_ONLY"},
}


def provision(
    settings: Settings, *, with_store: bool = True, queues: Iterable[str] = ()
) -> Iterator[tuple[str, str, bool]]:
    """Create missing resources, and yield `(kind, name, created)` for each resource, new or not.

    With `with_store=False`, this creates only what an app from `mdstore.queue.create_app` needs. `queues` are the names of
    more queues for tasks, with the same attributes as the queue of the settings. Raises `Unavailable`, `DeploymentBroken`, or
    `ConfigurationError` for a name that SQS does not take.
    """
    names = list(dict.fromkeys([settings.queue, *map(_checked_name, queues)]))
    with boto_errors("provision"):
        aws = AwsClients(settings)
        yield from _queue_resources(aws, settings, names)
        if with_store:
            yield from _store_resources(aws, settings)


def _checked_name(name: str) -> str:
    if not _QUEUE_NAME.fullmatch(name):
        expected = "1 to 80 letters, digits, hyphens and underscores; the name of a FIFO queue ends with .fifo"
        raise ConfigurationError(key="queue", value=name, expected=expected)
    return name


def _queue_resources(aws: AwsClients, settings: Settings, queues: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    yield "bucket", settings.bucket, _bucket(aws, settings)
    for prefix, created in _lifecycle_rules(aws, settings):
        yield "expiry", prefix, created
    for queue, created in _queues(aws, settings, queues):
        yield "queue", queue, created
    if settings.signing_secret:
        yield "secret", settings.signing_secret, _secret(aws, settings.signing_secret)
    for topic in (settings.control_topic, settings.events_topic):
        yield "topic", topic, _topic(aws, settings, topic)
    created = _table(aws, settings.results_table, [("id", "HASH")], ttl="ttl", index=OPEN)
    yield "table", settings.results_table, created
    yield "table", settings.delayed_table, _table(aws, settings.delayed_table, _ITEM_KEY, ttl="expires_at")


def _store_resources(aws: AwsClients, settings: Settings) -> Iterator[tuple[str, str, bool]]:
    yield "table", settings.records_table, _table(aws, settings.records_table, _ITEM_KEY[:1], ttl="expires_at")
    yield "table", settings.ledger_table, _table(aws, settings.ledger_table, _ITEM_KEY, ttl="expires_at")


def _secret(aws: AwsClients, name: str) -> bool:
    """Create the secret that holds the key of signed messages, with a random key."""
    try:
        aws.secrets.describe_secret(SecretId=name)
    except aws.secrets.exceptions.ResourceNotFoundException:
        aws.secrets.create_secret(Name=name, SecretString=token_hex(32))
        return True
    return False


def _bucket(aws: AwsClients, settings: Settings) -> bool:
    try:
        aws.s3.head_bucket(Bucket=settings.bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
    else:
        return False
    location: dict[str, Any] = {}
    if settings.region != "us-east-1":
        location["CreateBucketConfiguration"] = {"LocationConstraint": settings.region}
    aws.s3.create_bucket(Bucket=settings.bucket, **location)
    public_access_blocks = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    aws.s3.put_public_access_block(
        Bucket=settings.bucket,
        PublicAccessBlockConfiguration=dict.fromkeys(public_access_blocks, True),  # type: ignore[arg-type]
    )
    return True


def _lifecycle_rules(aws: AwsClients, settings: Settings) -> Iterator[tuple[str, bool]]:
    """Create the lifecycle rules that expire claim-check objects; each rule is named after its prefix.

    S3 replaces all rules of a bucket in one call, so the call repeats the rules that others made.
    """
    found: dict[str, Any] = {}
    try:
        found = dict(aws.s3.get_bucket_lifecycle_configuration(Bucket=settings.bucket))
    except ClientError as error:
        if error_code(error) != "NoSuchLifecycleConfiguration":
            raise
    wanted: dict[str, Any] = {
        prefix: {"ID": prefix, "Filter": {"Prefix": prefix}, "Status": "Enabled", "Expiration": {"Days": days}}
        for days in CLAIM_DAYS
        if (prefix := f"{settings.claim_prefix}{days}/")
    }
    rules = found.get("Rules", [])
    missing = [prefix for prefix, rule in wanted.items() if rule not in rules]
    if missing:
        others = [rule for rule in rules if rule.get("ID") not in wanted]
        kept = {name: found[name] for name in ("TransitionDefaultMinimumObjectSize",) if name in found}
        aws.s3.put_bucket_lifecycle_configuration(
            Bucket=settings.bucket, LifecycleConfiguration={"Rules": [*others, *wanted.values()]}, **kept
        )
    for prefix in wanted:
        yield prefix, prefix in missing


def _queues(aws: AwsClients, settings: Settings, queues: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Create the queues of tasks, after their dead-letter queues. SQS requires a FIFO one for FIFO queues."""
    arns = {}
    for is_fifo_queue in sorted({is_fifo(queue) for queue in queues}):
        name = f"{settings.dead_letter_queue}.fifo" if is_fifo_queue else settings.dead_letter_queue
        url, created = _queue(aws, name, {"MessageRetentionPeriod": _RETENTION})
        yield name, created
        found = aws.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        arns[is_fifo_queue] = found["Attributes"]["QueueArn"]
    for queue in queues:
        # SQS may deliver once more than workers execute: the worker that gets the extra delivery dead-letters the message
        # with the reason.
        redrive = {"deadLetterTargetArn": arns[is_fifo(queue)], "maxReceiveCount": str(settings.max_receives + 1)}
        attributes = {
            "VisibilityTimeout": str(settings.visibility_timeout),
            "MessageRetentionPeriod": _RETENTION,
            "RedrivePolicy": json.dumps(redrive),
        }
        yield queue, _queue(aws, queue, attributes)[1]


def _queue(aws: AwsClients, name: str, attributes: dict[str, str]) -> tuple[str, bool]:
    try:
        url = aws.sqs.get_queue_url(QueueName=name)["QueueUrl"]
    except ClientError as error:
        if not is_gone(error_code(error)):
            raise
        if is_fifo(name):
            attributes = {**attributes, "FifoQueue": "true"}
        return aws.sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"], True  # type: ignore[arg-type]
    aws.sqs.set_queue_attributes(QueueUrl=url, Attributes=attributes)  # type: ignore[arg-type]
    return url, False


def _topic(aws: AwsClients, settings: Settings, name: str) -> bool:
    """Create a topic, and set its policy.

    Only principals of this account may use the topic, as far as their roles allow it. Only queues whose names begin with the
    topic's name may subscribe.
    """
    url = aws.sqs.get_queue_url(QueueName=settings.queue)["QueueUrl"]
    arn = aws.arn("sns", name, queue_url=url)
    _, partition, _, _, owner, _ = arn.split(":")
    try:
        aws.sns.get_topic_attributes(TopicArn=arn)
        created = False
    except aws.sns.exceptions.NotFoundException:
        aws.sns.create_topic(Name=name)
        created = True
    account = {
        "Sid": "Account",
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:{partition}:iam::{owner}:root"},
        "Action": ["sns:Publish", "sns:Subscribe", "sns:ListSubscriptionsByTopic", "sns:GetTopicAttributes"],
        "Resource": arn,
    }
    only_own_queues = {
        "Sid": "OnlyOwnQueues",
        "Effect": "Deny",
        "Principal": "*",
        "Action": "sns:Subscribe",
        "Resource": arn,
        "Condition": {"StringNotLike": {"sns:Endpoint": aws.arn("sqs", f"{name}-*", queue_url=url)}},
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [account, only_own_queues]})
    aws.sns.set_topic_attributes(TopicArn=arn, AttributeName="Policy", AttributeValue=policy)
    return created


def _table(
    aws: AwsClients, name: str, key: list[tuple[str, Any]], *, ttl: str, index: dict[str, Any] | None = None
) -> bool:
    client = aws.dynamodb
    keys = [(attribute, "S") for attribute, _ in key]
    indexed: dict[str, Any] = {"GlobalSecondaryIndexes": [index]} if index else {}
    created = True
    try:
        client.create_table(
            TableName=name,
            BillingMode="PAY_PER_REQUEST",
            AttributeDefinitions=_attributes([*keys, *(OPEN_KEYS if index else [])]),
            KeySchema=[{"AttributeName": attribute, "KeyType": kind} for attribute, kind in key],
            **indexed,
        )
    except client.exceptions.ResourceInUseException:
        created = False
    client.get_waiter("table_exists").wait(TableName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 120})
    current = client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
    if current.get("TimeToLiveStatus") not in ("ENABLED", "ENABLING"):
        client.update_time_to_live(TableName=name, TimeToLiveSpecification={"Enabled": True, "AttributeName": ttl})
    found = client.describe_table(TableName=name)["Table"].get("GlobalSecondaryIndexes", [])
    if index and index["IndexName"] not in [one.get("IndexName") for one in found]:
        client.update_table(
            TableName=name,
            AttributeDefinitions=_attributes([*keys, *OPEN_KEYS]),
            GlobalSecondaryIndexUpdates=[{"Create": index}],  # type: ignore[typeddict-item]
        )
    return created


def _attributes(named: Iterable[tuple[str, Any]]) -> list[Any]:
    return [{"AttributeName": name, "AttributeType": kind} for name, kind in named]
