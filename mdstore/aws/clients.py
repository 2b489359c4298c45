"""Clients of AWS, or of the endpoints that the settings name."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import botocore.session
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import ProfileNotFound

from mdstore.aws.boto import boto_errors
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
    """All clients of one process. They connect on first use. Threads may share them; a forked child must make its own."""

    def __init__(self, settings: Settings) -> None:
        self.owner_pid = os.getpid()
        self._settings = settings
        # On one machine, a service that does not answer is not running; over a network, it is worth waiting longer.
        retry = Retry(patience=3.0 if settings.profile == "local" else 20.0)
        self._session = session = _session(settings)
        self.s3: S3Client = make_client(settings, "s3", session)
        #: boto3's SQS client, only for calls off the hot path: creating and describing queues.
        self.sqs: SQSClient = make_client(settings, "sqs", session)
        #: boto3's DynamoDB client, only for calls off the hot path: creating and describing tables.
        self.dynamodb: DynamoDBClient = make_client(settings, "dynamodb", session)
        credentials = session.get_credentials()
        if credentials is None:
            raise ConfigurationError(key="aws credentials", value=None, expected="keys, a profile or a role")
        #: The fast DynamoDB client, for all calls on the hot path. boto3's clients supply the endpoints.
        self.dynamo = DynamoClient(
            http=SignedHttp(service="dynamodb", region=settings.region, credentials=credentials),
            endpoint=self.dynamodb.meta.endpoint_url,
            retry=retry,
        )
        s3_http = SignedHttp(service="s3", region=settings.region, credentials=credentials)
        #: The objects of the configured bucket: payloads, blobs, and large messages of the claim check.
        self.objects = Objects(client=self.s3, http=s3_http, bucket=settings.bucket, retry=retry)
        #: The fast SQS client: sends, receives and deletes messages.
        self.queues = Sqs(
            http=SignedHttp(
                service="sqs", region=settings.region, credentials=credentials, timeout=settings.wait_time + 15
            ),
            endpoint=self.sqs.meta.endpoint_url,
            retry=retry,
        )

    @cached_property
    def sns(self) -> SNSClient:
        """boto3's SNS client, for commands and events. It is made on first use, because most processes need none."""
        client: SNSClient = make_client(self._settings, "sns", self._session)
        return client

    def secret_versions(self, name: str) -> tuple[str, ...]:
        """Return the current value of a secret in Secrets Manager and, if it was rotated, the previous one.

        Raises `Unavailable` or `DeploymentBroken`.
        """
        found = []
        for stage in ("AWSCURRENT", "AWSPREVIOUS"):
            with boto_errors(f"Secrets Manager: secret {name!r}"):
                try:
                    found.append(self.secrets.get_secret_value(SecretId=name, VersionStage=stage)["SecretString"])
                except self.secrets.exceptions.ResourceNotFoundException:
                    if stage == "AWSCURRENT":
                        raise
        return tuple(found)

    @cached_property
    def secrets(self) -> Any:
        """boto3's client of Secrets Manager, which only signed messages need."""
        return make_client(self._settings, "secretsmanager", self._session)

    def arn(self, service: str, name: str, *, queue_url: str) -> str:
        """Return the ARN of a queue or topic in the account of `queue_url`, which ends with /account/name, without a call."""
        return f"arn:{self.sqs.meta.partition}:{service}:{self._settings.region}:{queue_url.split('/')[-2]}:{name}"


def make_client(
    settings: Settings,
    service: Literal["s3", "sqs", "sns", "dynamodb", "secretsmanager"],
    session: Session | None = None,
) -> Any:
    """Make a boto3 client of `service`."""
    endpoint = settings.endpoint(service)
    config: dict[str, Any] = {}
    if service == "s3":
        # Emulators need paths, because they have no DNS names for virtual hosts. AWS gets "virtual" and not "auto", because
        # "auto" presigns URLs for us-east-1, which redirects callers to the bucket's region.
        config["s3"] = {"addressing_style": "path" if endpoint else "virtual"}
    return (session or _session(settings)).client(
        service,
        endpoint_url=endpoint,
        config=Config(
            # `Objects` retries S3 calls with `aws.retry`. Nesting boto3's retries inside that would overrun every deadline.
            retries={"mode": "standard", "total_max_attempts": 1 if service == "s3" else 6},
            connect_timeout=5,
            read_timeout=15,
            max_pool_connections=16,
            **config,
        ),
    )


def _session(settings: Settings) -> Session:
    """Make a session with the keys of the settings, or else with botocore's own credential chain (roles, profiles, SSO)."""
    if settings.profile == "local":
        # A developer's AWS_PROFILE must not affect the local profile.
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
