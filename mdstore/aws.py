"""Connections to AWS, or to whatever the endpoint settings name, and the one translation of boto3's errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import botocore.session
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ProfileNotFound

from mdstore.awsjson import is_not_now
from mdstore.dynamo.client import DynamoClient
from mdstore.dynamo.retry import Retry
from mdstore.errors import ConfigurationError, DeploymentBroken, MdstoreError, Unavailable
from mdstore.settings import Settings
from mdstore.signed import SignedHttp
from mdstore.sqs import Sqs

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sns import SNSClient
    from mypy_boto3_sqs import SQSClient


class Aws:
    """One set of clients, which connect when they are used. Threads may share it; a forked child makes its own."""

    def __init__(self, settings: Settings, *, retry: Retry | None = None) -> None:
        self.owner_pid = os.getpid()
        self._settings = settings
        self._session = session = _session(settings)
        self.s3: S3Client = make_client(settings, "s3", session)
        self.sqs: SQSClient = make_client(settings, "sqs", session)
        #: boto3's other two are for what is not on the way of the data: making and describing queues and tables.
        self.dynamodb: DynamoDBClient = make_client(settings, "dynamodb", session)
        credentials = session.get_credentials()
        if credentials is None:
            raise ConfigurationError(key="aws credentials", value=None, expected="keys, a profile or a role")
        #: The fast ways: for records and ledger, for reading payloads, for messages. boto3 knows where the endpoints are.
        self.dynamo = DynamoClient(
            http=SignedHttp(service="dynamodb", region=settings.region, credentials=credentials),
            endpoint=self.dynamodb.meta.endpoint_url,
            retry=retry,
        )
        self.s3_http = SignedHttp(service="s3", region=settings.region, credentials=credentials)
        self.queues = Sqs(
            http=SignedHttp(
                service="sqs", region=settings.region, credentials=credentials, timeout=settings.wait_time + 15
            ),
            endpoint=self.sqs.meta.endpoint_url,
            retry=retry,
        )

    @cached_property
    def sns(self) -> SNSClient:
        """For commands and events; most processes need none."""
        client: SNSClient = make_client(self._settings, "sns", self._session)
        return client

    def arn(self, service: str, name: str, *, queue_url: str) -> str:
        """The ARN of a queue or topic beside a queue: its URL ends with /account/name, so nobody needs to be asked."""
        return f"arn:{self.sqs.meta.partition}:{service}:{self._settings.region}:{queue_url.split('/')[-2]}:{name}"


def make_client(
    settings: Settings, service: Literal["s3", "sqs", "sns", "dynamodb"], session: Session | None = None
) -> Any:
    """A boto3 client of `service`."""
    endpoint = settings.endpoint(service)
    config: dict[str, Any] = {}
    if service == "s3":
        # A path works for every bucket name; a virtual host needs DNS that an emulator does not have. "virtual" and not
        # "auto", by which URLs that are signed beforehand go to us-east-1, which sends callers on to the bucket's region.
        config["s3"] = {"addressing_style": "path" if endpoint else "virtual"}
    return (session or _session(settings)).client(
        service,
        endpoint_url=endpoint,
        config=Config(
            # S3 is called under the one policy of `dynamo.retry`; two policies, one in the other, would outlive any deadline.
            retries={"mode": "standard", "total_max_attempts": 1 if service == "s3" else 6},
            connect_timeout=5,
            read_timeout=15,
            max_pool_connections=16,
            **config,
        ),
    )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn boto3's errors into `Unavailable` and `DeploymentBroken`, with `what` was being done."""
    try:
        yield
    except ClientError as error:
        raise _translation(what, error) from error
    except BotoCoreError as error:
        raise Unavailable(f"{what}: {error}", code=type(error).__name__) from error


def error_code(error: ClientError) -> str:
    """AWS's code of an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _translation(what: str, error: ClientError) -> MdstoreError:
    code = error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = Unavailable if is_not_now(code, status) else DeploymentBroken
    return kind(f"{what}: {error}", code=code)


def _session(settings: Settings) -> Session:
    """Keys from the settings where given, else botocore's own chain (roles, profiles, SSO)."""
    if settings.profile == "local":
        # A developer's AWS_PROFILE must not decide where the local profile looks.
        core = botocore.session.Session(session_vars={"profile": (None, [], None, None)})
    else:
        core = botocore.session.Session(profile=settings.aws_profile)
        try:
            core.get_scoped_config()
        except ProfileNotFound as error:
            expected = "the name of a profile in AWS's configuration files"
            raise ConfigurationError(key="aws_profile", value=settings.aws_profile, expected=expected) from error
    return Session(
        botocore_session=core,
        region_name=settings.region,
        aws_access_key_id=settings.aws_access_key_id,
        aws_secret_access_key=settings.aws_secret_access_key,
        aws_session_token=settings.aws_session_token,
    )
