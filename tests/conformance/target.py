"""The targets of the suite. Each is one DynamoDB with tables that no other run uses.

memory      the unit tests' double, held to the same semantics
ministack   the embedded AWS, started here
moto        moto's server, started here; the suite never calls it concurrently, because it loses concurrent writes
endpoint    the DynamoDB that `--endpoint` names
aws         AWS, with botocore's own credentials chain and AWS_REGION
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from boto3.session import Session
from botocore.credentials import Credentials

from mdstore.aws.clients import make_client
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.http import SignedHttp
from mdstore.aws.retry import Retry
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.provision import OPEN, OPEN_KEYS
from mdstore.settings import Settings, load_settings
from tests.unit.fakes import MemoryDynamo

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

#: The targets that are started here when no endpoint is given.
EMBEDDED = ("ministack", "moto")
MEMORY = "memory"
#: Targets that were measured to lose concurrent writes, so that tests under load prove nothing about them.
SINGLE_THREADED = (MEMORY, "moto")

#: Seconds for which a "not now" is retried. moto gets one call at a time, so it has no reason to say "not now".
_PATIENCE = {"ministack": 10.0, "moto": 0.0, "endpoint": 30.0, "aws": 60.0}
_KEYS: Mapping[str, tuple[str, ...]] = {"records": ("pk",), "ledger": ("pk", "sk"), "results": ("id",)}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One DynamoDB and the names of its tables. The double has no credentials, and its tables need not be created."""

    name: str
    dynamo: DynamoClient
    settings: Settings
    client: DynamoDBClient | None = None
    credentials: Credentials | None = None

    def another(self, credentials: Credentials | None = None) -> DynamoClient:
        """Return a new client, as another worker has it, with other credentials if they are given."""
        assert self.client is not None, "the double has one client"
        return _dynamo(self.name, self.settings, self.client, credentials or self.credentials)

    def make_tables(self, stack: ExitStack) -> None:
        """Create the tables and wait until they can be used; closing `stack` deletes them in any case."""
        if self.client is None:
            return
        names = {kind: getattr(self.settings, f"{kind}_table") for kind in _KEYS}
        for kind, table in names.items():
            # Registered before the call, because a table may be created although the answer is lost.
            stack.callback(_remove, self.client, table)
            _create(self.client, table, _KEYS[kind])
        for table in names.values():
            self.client.get_waiter("table_exists").wait(TableName=table, WaiterConfig={"Delay": 1, "MaxAttempts": 120})


@contextmanager
def running(name: str, url: str | None) -> Iterator[Target]:
    """Yield the target `name`, started if necessary. `url` is the value of `--endpoint`."""
    with ExitStack() as stack:
        if name == MEMORY:
            yield Target(name=name, dynamo=MemoryDynamo(), settings=_settings({}))
            return
        if name == "aws":
            # Payloads stay in memory, so no bucket is used.
            settings = _settings(os.environ, profile="aws", bucket="none", endpoint_url=None)
        elif name == "endpoint":
            settings = _settings(os.environ, endpoint_url=url, endpoint_url_dynamodb=url)
        else:
            started = _ministack() if name == "ministack" else _moto()
            settings = _settings({}, endpoint_url=stack.enter_context(started))
        client = make_client(settings, "dynamodb")
        credentials = _credentials(settings)
        dynamo = _dynamo(name, settings, client, credentials)
        stack.callback(dynamo.close)
        yield Target(name=name, dynamo=dynamo, settings=settings, client=client, credentials=credentials)


def _settings(environ: Mapping[str, str], **arguments: object) -> Settings:
    return renamed(load_settings(environ, **arguments).settings)


def renamed(settings: Settings) -> Settings:
    """Return the settings with table names that no other run has."""
    unique = uuid4().hex[:12]
    return settings.model_copy(update={f"{kind}_table": f"mdstore-conformance-{unique}-{kind}" for kind in _KEYS})


def _credentials(settings: Settings) -> Credentials | None:
    """Return the credentials of the settings, or else those that botocore's own chain finds."""
    return Session(
        profile_name=settings.aws_profile if settings.profile == "aws" else None,
        aws_access_key_id=settings.aws_access_key_id,
        aws_secret_access_key=settings.aws_secret_access_key,
        aws_session_token=settings.aws_session_token,
    ).get_credentials()


def _dynamo(name: str, settings: Settings, client: DynamoDBClient, credentials: Credentials | None) -> DynamoClient:
    """Return the project's own client for the endpoint that boto3's client resolved."""
    assert credentials is not None, "there are no credentials"
    http = SignedHttp(service="dynamodb", region=settings.region, credentials=credentials)
    return DynamoClient(http=http, endpoint=client.meta.endpoint_url, retry=Retry(patience=_PATIENCE[name]))


@contextmanager
def _ministack() -> Iterator[str]:
    with EmbeddedAws(port=free_port()) as aws:
        yield aws.url


@contextmanager
def _moto() -> Iterator[str]:
    """Run moto's server as a process that ends with its standard input, and so even if this process is killed."""
    command = [sys.executable, "-m", "tests.conformance.moto_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "moto did not start"
        yield f"http://127.0.0.1:{port}"


def _create(client: DynamoDBClient, table: str, key: tuple[str, ...]) -> None:
    definitions: list[Any] = [{"AttributeName": name, "AttributeType": "S"} for name in key]
    schema: list[Any] = [
        {"AttributeName": name, "KeyType": kind} for name, kind in zip(key, ("HASH", "RANGE"), strict=False)
    ]
    indexes: dict[str, Any] = {}
    if key == ("id",):
        definitions += [{"AttributeName": name, "AttributeType": kind} for name, kind in OPEN_KEYS]
        indexes = {"GlobalSecondaryIndexes": [OPEN]}
    client.create_table(
        TableName=table, BillingMode="PAY_PER_REQUEST", AttributeDefinitions=definitions, KeySchema=schema, **indexes
    )


def _remove(client: DynamoDBClient, table: str) -> None:
    with suppress(client.exceptions.ResourceNotFoundException):
        try:
            client.delete_table(TableName=table)
        except client.exceptions.ResourceInUseException:  # the table is still being created
            client.get_waiter("table_exists").wait(TableName=table)
            client.delete_table(TableName=table)
