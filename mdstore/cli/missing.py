"""Finds out which resources of the deployment do not exist, to name them in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from mdstore.aws.boto import error_code
from mdstore.aws.clients import AwsClients
from mdstore.aws.sqs import is_gone
from mdstore.errors import DeploymentBroken, MdstoreError
from mdstore.settings import Settings, load_settings

_GONE = ("ResourceNotFoundException", "NoSuchBucket", "404")


def hint(error: MdstoreError) -> str:
    """Return which resources are missing, and the command that creates them, if that explains `error`."""
    if not isinstance(error, DeploymentBroken) or not _is_missing(error.code):
        return ""
    try:
        found = ", ".join(_missing(load_settings().settings))
    except (MdstoreError, ClientError, BotoCoreError):
        found = ""
    return f"{f'Missing: {found}. ' if found else ''}`mdstore provision` creates what is missing."


def _is_missing(code: str) -> bool:
    return code in _GONE or is_gone(code)


def _missing(settings: Settings) -> Iterator[str]:
    aws = AwsClients(settings)
    probes: list[tuple[str, Callable[..., Any], dict[str, str]]] = [
        (f"bucket {settings.bucket}", aws.s3.head_bucket, {"Bucket": settings.bucket}),
        (f"queue {settings.queue}", aws.sqs.get_queue_url, {"QueueName": settings.queue}),
    ]
    tables = (settings.records_table, settings.ledger_table, settings.results_table, settings.delayed_table)
    probes += [(f"table {name}", aws.dynamodb.describe_table, {"TableName": name}) for name in tables]
    for name, probe, arguments in probes:
        try:
            probe(**arguments)
        except ClientError as error:
            if not _is_missing(error_code(error)):
                raise
            yield name
