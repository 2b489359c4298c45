"""Connections to AWS, or to whatever the endpoint settings name."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import botocore.session
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import ProfileNotFound

from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.http import SignedHttp
from mdstore.aws.retry import Retry
from mdstore.aws.s3 import Objects
from mdstore.aws.sqs import Sqs
from mdstore.errors import ConfigurationError
from mdstore.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sns import SNSClient
    from mypy_boto3_sqs import SQSClient


class AwsClients:
    """One set of clients, which connect when they are used. Threads may share it; a forked child makes its own."""

    def __init__(self, settings: Settings) -> None:
        self.owner_pid = os.getpid()
        self._settings = settings
        # On one machine what does not answer is not there; a network deserves more patience.
        retry = Retry(patience=3.0 if settings.profile == "local" else 20.0)
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
        s3_http = SignedHttp(service="s3", region=settings.region, credentials=credentials)
        #: The objects of the configured bucket: payloads, blobs and messages of claim checks.
        self.objects = Objects(client=self.s3, http=s3_http, bucket=settings.bucket, retry=retry)
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
