"""Clients of AWS, or of the endpoints that the settings name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from botocore.config import Config
from botocore.exceptions import ProfileNotFound
from botocore.loaders import Loader, create_loader
from botocore.session import Session

from mdstore.aws.boto import boto_errors
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.http import SignedHttp
from mdstore.aws.retry import Retry
from mdstore.aws.s3 import Objects, find_bucket_url, path_url
from mdstore.aws.sqs import Sqs
from mdstore.errors import ConfigurationError
from mdstore.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sns import SNSClient
    from mypy_boto3_sqs import SQSClient


Service = Literal["s3", "sqs", "sns", "dynamodb", "secretsmanager"]


class AwsClients:
    """All clients of one process. They connect on first use. Threads may share it; a forked child must make its own.

    botocore's clients serve the calls off the hot path, such as creating queues and tables, and know AWS's endpoints. Making
    three of them takes 0.15 s of processor time, so one that is not needed is not made.
    """

    def __init__(self, settings: Settings) -> None:
        self.owner_pid = os.getpid()
        self._settings = settings
        self._made: dict[Service, Any] = {}
        self._lock = threading.RLock()  # botocore's sessions must not make two clients at the same time
        # On one machine, a service that does not answer is not running; over a network, it is worth waiting longer.
        retry = Retry(patience=3.0 if settings.profile == "local" else 20.0)
        self._session = session = _session(settings)
        credentials = session.get_credentials()
        if credentials is None:
            raise ConfigurationError(key="aws credentials", value=None, expected="keys, a profile or a role")
        #: The fast DynamoDB client, for all calls on the hot path.
        self.dynamo = DynamoClient(
            http=SignedHttp(service="dynamodb", region=settings.region, credentials=credentials),
            endpoint=self._endpoint("dynamodb"),
            retry=retry,
        )
        s3_http = SignedHttp(service="s3", region=settings.region, credentials=credentials)
        #: The objects of the configured bucket: payloads, blobs, and large messages of the claim check.
        self.objects = Objects(bucket=settings.bucket, bucket_url=self._bucket_url(), http=s3_http, retry=retry)
        #: The fast SQS client: sends, receives and deletes messages.
        self.queues = Sqs(
            http=SignedHttp(
                service="sqs", region=settings.region, credentials=credentials, timeout=settings.wait_time + 15
            ),
            endpoint=self._endpoint("sqs"),
            retry=retry,
        )

    @property
    def s3(self) -> S3Client:
        """The S3 client of botocore, for the bucket itself."""
        client: S3Client = self._client("s3")
        return client

    @property
    def sqs(self) -> SQSClient:
        """The SQS client of botocore, for creating and describing queues."""
        client: SQSClient = self._client("sqs")
        return client

    @property
    def dynamodb(self) -> DynamoDBClient:
        """The DynamoDB client of botocore, for creating and describing tables."""
        client: DynamoDBClient = self._client("dynamodb")
        return client

    @property
    def sns(self) -> SNSClient:
        """The SNS client of botocore, for commands and events."""
        client: SNSClient = self._client("sns")
        return client

    @property
    def secrets(self) -> Any:
        """The Secrets Manager client of botocore, which only signed messages need."""
        return self._client("secretsmanager")

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

    def arn(self, service: str, name: str, *, queue_url: str) -> str:
        """Return the ARN of a queue or topic in the account of `queue_url`, which ends with /account/name, without a call."""
        return f"arn:{self.sqs.meta.partition}:{service}:{self._settings.region}:{queue_url.split('/')[-2]}:{name}"

    def _client(self, service: Service) -> Any:
        with self._lock:
            if service not in self._made:
                self._made[service] = make_client(self._settings, service, self._session)
            return self._made[service]

    def _endpoint(self, service: Service) -> str:
        endpoint: str = self._settings.endpoint(service) or self._client(service).meta.endpoint_url
        return endpoint

    def _bucket_url(self) -> Callable[[], str]:
        bucket, endpoint = self._settings.bucket, self._settings.endpoint("s3")
        # botocore finds the URL on first use, because it gets the credentials of a role for that.
        return partial(path_url, endpoint, bucket) if endpoint else partial(find_bucket_url, self.s3, bucket)


def make_client(
    settings: Settings,
    service: Service,
    session: Session | None = None,
) -> Any:
    """Make a botocore client of `service`."""
    endpoint = settings.endpoint(service)
    config: dict[str, Any] = {}
    if service == "s3":
        # Emulators need paths, because they have no DNS names for virtual hosts. AWS gets "virtual" and not "auto", because
        # "auto" presigns URLs for us-east-1, which redirects callers to the bucket's region.
        config["s3"] = {"addressing_style": "path" if endpoint else "virtual"}
    return (session or _session(settings)).create_client(
        service,
        endpoint_url=endpoint,
        config=Config(
            # `Objects` retries S3 calls with `aws.retry`. Nesting botocore's retries inside that would overrun every deadline.
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
        session = Session(session_vars={"profile": (None, [], None, None)})
    else:
        session = Session(profile=settings.aws_profile)
        try:
            session.get_scoped_config()
        except ProfileNotFound as error:
            expected = "the name of a profile in AWS's configuration files"
            raise ConfigurationError(key="aws_profile", value=settings.aws_profile, expected=expected) from error
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    session.set_config_variable("region", settings.region)
    keys = (settings.aws_access_key_id, settings.aws_secret_access_key, settings.aws_session_token)
    if any(keys):
        session.set_credentials(*keys)  # type: ignore[arg-type]  # if one is missing, AWS refuses the first call
    return session


@cache
def _loader(data_path: str | None) -> Loader:
    """Return the reader of botocore's descriptions of services. All sessions share it and what it has read."""
    return create_loader(data_path)
