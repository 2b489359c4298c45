"""The clients of AWS: which are made when, and the endpoints that they call."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest

import mdstore.aws.clients
from mdstore.aws.clients import AwsClients, make_client
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.sqs import Sqs
from mdstore.settings import Settings, load_settings

_ON_AWS = {
    "MDSTORE_PROFILE": "aws",
    "AWS_REGION": "eu-central-1",
    "MDSTORE_BUCKET": "acme-payloads",
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "secret",
}


def settings(**environ: str) -> Settings:
    return load_settings(environ).settings


def url(client: DynamoClient | Sqs) -> str:
    """Return the URL that a client calls."""
    return client._protocol.request("Any", b"")[0]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the services that a client of botocore was made for."""
    services: list[str] = []

    def recorded(found: Settings, service: Any, session: Any = None) -> Any:
        services.append(service)
        return make_client(found, service, session)

    monkeypatch.setattr(mdstore.aws.clients, "make_client", recorded)
    return services


@pytest.mark.parametrize("end", ["", "/", "/base"])
def test_with_an_endpoint_no_client_of_botocore_is_made_at_the_start(made: list[str], end: str) -> None:
    """Requests go to the endpoint that botocore would take. One of its clients is made on first use, and once."""
    clients = AwsClients(settings(AWS_ENDPOINT_URL=f"http://127.0.0.1:1{end}"))
    assert made == []
    assert url(clients.dynamo) == clients.dynamodb.meta.endpoint_url.rstrip("/") + "/"
    assert url(clients.queues) == clients.sqs.meta.endpoint_url.rstrip("/") + "/"
    assert clients.sqs is clients.sqs
    assert made == ["dynamodb", "sqs"]


def test_on_aws_botocore_finds_the_endpoints(made: list[str]) -> None:
    """Without an endpoint in the settings, the clients are made at once, so that no message waits for them."""
    clients = AwsClients(settings(**_ON_AWS))
    assert url(clients.dynamo) == "https://dynamodb.eu-central-1.amazonaws.com/"
    assert url(clients.queues) == "https://sqs.eu-central-1.amazonaws.com/"
    assert sorted(made) == ["dynamodb", "s3", "sqs"]


def test_threads_share_one_client(made: list[str]) -> None:
    """Sessions of botocore may not make two clients at the same time."""
    clients = AwsClients(settings())
    barrier, found = threading.Barrier(4), []

    def ask() -> None:
        barrier.wait()
        found.append(clients.sqs)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["sqs"]
    assert len(set(map(id, found))) == 1


def test_clients_share_the_descriptions_of_services() -> None:
    """Each description takes megabytes, and a process may have many clients."""
    loaders = {id(AwsClients(settings())._session.get_component("data_loader")) for _ in range(3)}
    assert len(loaders) == 1


def test_reading_needs_neither_celery_nor_boto3() -> None:
    """The commands that only read start faster without them."""
    code = (
        "import sys, mdstore.cli, mdstore.client; mdstore.client.Client().store; "
        "print(sorted({'celery', 'kombu', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
