"""Connections to AWS, or to whatever the endpoint settings name. Opened on first use, in the process that uses them."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import botocore.session
from boto3.session import Session
from botocore.config import Config

from mdstore.dynamo.client import DynamoClient
from mdstore.errors import ConfigurationError
from mdstore.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient


class Aws:
    """One set of connections. Threads may share it; a forked child must make its own (`owner_pid` says whose it is)."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.owner_pid = os.getpid()

    @cached_property
    def session(self) -> Session:
        """The boto3 session: keys from the settings where given, else botocore's own chain (roles, profiles, SSO)."""
        settings = self.settings
        local = settings.profile == "local"
        core = botocore.session.Session(profile=None if local else settings.aws_profile)
        return Session(
            botocore_session=core,
            region_name=settings.region,
            aws_access_key_id=settings.aws_access_key_id,
            aws_secret_access_key=settings.aws_secret_access_key,
            aws_session_token=settings.aws_session_token,
        )

    def _config(self, **extra: Any) -> Config:
        return Config(
            retries={"mode": "standard", "total_max_attempts": 6},
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=self.settings.transactions_in_flight + 8,
            **extra,
        )

    @cached_property
    def s3(self) -> S3Client:
        """boto3's S3 client."""
        # A path works for every bucket name and endpoint; virtual hosts need DNS that an emulator does not have.
        style = {"addressing_style": "path"} if self.settings.endpoint("s3") else {}
        return self.session.client("s3", endpoint_url=self.settings.endpoint("s3"), config=self._config(s3=style))

    @cached_property
    def sqs(self) -> SQSClient:
        """boto3's SQS client."""
        return self.session.client("sqs", endpoint_url=self.settings.endpoint("sqs"), config=self._config())

    @cached_property
    def dynamodb_admin(self) -> DynamoDBClient:
        """boto3's DynamoDB client, for what is not on the way of the data: making and describing tables."""
        endpoint = self.settings.endpoint("dynamodb")
        return self.session.client("dynamodb", endpoint_url=endpoint, config=self._config())

    @cached_property
    def dynamo(self) -> DynamoClient:
        """The fast client, for records and ledger."""
        credentials = self.session.get_credentials()
        if credentials is None:
            raise ConfigurationError(key="aws credentials", value=None, expected="keys, a profile or a role")
        return DynamoClient(
            credentials=credentials,
            endpoint=self.dynamodb_admin.meta.endpoint_url,
            region=self.settings.region,
            connections=self.settings.transactions_in_flight + 8,
        )
