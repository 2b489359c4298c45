"""Signed calls: the signature equals botocore's, and connections are reused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pycurl
import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest

from mdstore.aws.http import Response, SignedHttp
from mdstore.errors import ConfigurationError, Unavailable
from mdstore.local.emulator import free_port
from tests.unit.endpoint import Endpoint, Keys


def set_libcurl(patch: pytest.MonkeyPatch, number: int, *protocols: str) -> None:
    """Make pycurl report another version of libcurl."""
    patch.setattr(pycurl, "version_info", lambda: (11, "", number, "Linux", 0, "", 0, "", protocols))
    patch.setattr(pycurl, "version", "PycURL/7.45.3 libcurl/7.61.1")


@pytest.mark.parametrize("number", [0x080B01, 0x080C00, 0x090000])
def test_libcurl_8_11_1_and_later_is_accepted(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Versions are compared as numbers."""
    set_libcurl(monkeypatch, number, "http", "https")
    SignedHttp(service="s3", region="x", credentials=Keys()).close()


@pytest.mark.parametrize(
    ("number", "protocols"), [(0x080B00, ["http", "https"]), (0x075801, ["http", "https"]), (0x080B01, ["http"])]
)
def test_an_unusable_libcurl_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, number: int, protocols: list[str]
) -> None:
    """An old libcurl signs wrongly or not at all; some have no TLS. The error names the version found and the one needed."""
    set_libcurl(monkeypatch, number, *protocols)
    monkeypatch.delattr(pycurl, "AWS_SIGV4")
    with pytest.raises(ConfigurationError) as caught:
        SignedHttp(service="s3", region="x", credentials=Keys())
    assert "PycURL/7.45.3 libcurl/7.61.1" in str(caught.value)
    assert "libcurl 8.11.1 or later with TLS" in str(caught.value)


@pytest.fixture
def http() -> Iterator[SignedHttp]:
    found = SignedHttp(service="dynamodb", region="eu-central-1", credentials=Keys(), timeout=5)
    yield found
    found.close()


def expected_signature(signer: Any, url: str, line: str, headers: dict[str, str], body: bytes) -> str:
    """Return the signature that botocore's own signer makes for a request as the server received it."""
    method, path, _ = line.split(" ")
    signed = headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    request = AWSRequest(
        method=method,
        url="http://" + urlsplit(url).netloc + path,
        data=body,
        headers={name: headers[name] for name in signed if name != "host"},
    )
    request.context["timestamp"] = headers["x-amz-date"]
    request.context["payload_signing_enabled"] = True
    canonical = signer.canonical_request(request)
    signature: str = signer.signature(signer.string_to_sign(request, canonical), request)
    return signature


def test_a_call_is_signed_as_botocore_signs_it(endpoint: Endpoint, http: SignedHttp) -> None:
    """The signature covers method, headers, session token and body, as AWS computes it."""
    endpoint.respond_with((200, {}))
    body = b'{"a":"\xc3\xbc"}' * 1_000
    http.send(endpoint.url + "/", ("Content-Type: application/x-amz-json-1.0", "X-Amz-Target: DynamoDB.X"), body)
    ((headers, received),) = endpoint.requests
    assert received == body
    assert headers["x-amz-security-token"] == "session-token"
    signer = SigV4Auth(Keys().get_frozen_credentials(), "dynamodb", "eu-central-1")
    wanted = expected_signature(signer, endpoint.url, endpoint.lines[0], headers, body)
    assert headers["authorization"].endswith(f"Signature={wanted}")


@pytest.mark.parametrize("key", ["payloads/r1", "payloads/2026-11-23/air%3Aports%40x%2By%3D", "payloads/a..b/~x_y-z"])
def test_a_read_from_s3_is_signed_as_botocore_signs_it(endpoint: Endpoint, key: str) -> None:
    """S3 has its own rules for paths and for the digest of the body; the range header is part of the call."""
    endpoint.respond_with((206, b"x"))
    http = SignedHttp(service="s3", region="eu-central-1", credentials=Keys())
    assert http.send(f"{endpoint.url}/bucket/{key}", ("Range: bytes=0-9",)).body == b"x"
    http.close()
    ((headers, body),) = endpoint.requests
    assert endpoint.lines == [f"GET /bucket/{key} HTTP/1.1"]
    assert headers["range"] == "bytes=0-9"
    signer = S3SigV4Auth(Keys().get_frozen_credentials(), "s3", "eu-central-1")
    wanted = expected_signature(signer, endpoint.url, endpoint.lines[0], headers, body)
    assert headers["authorization"].endswith(f"Signature={wanted}")


def test_a_response_has_status_headers_and_body(endpoint: Endpoint, http: SignedHttp) -> None:
    """Headers are found in any case, and an error has its body too."""
    endpoint.respond_with((418, b"teapot", {"X-Amz-Crc32": " 17 "}))
    answer = http.send(endpoint.url, body=b"")
    assert (answer.status, answer.body) == (418, b"teapot")
    assert answer.header(b"x-amz-crc32:") == b"17"
    assert answer.header(b"x-other:") is None


def test_the_secret_key_is_not_sent(endpoint: Endpoint, http: SignedHttp) -> None:
    """Only a signature derived from the secret key leaves the process."""
    endpoint.respond_with((200, {}))
    http.send(endpoint.url, body=b"x")
    assert "secret" not in repr(endpoint.requests)


def test_concurrent_calls_complete_with_their_tags(endpoint: Endpoint, http: SignedHttp) -> None:
    """Each response belongs to its own call, and the next round reuses the connections."""
    endpoint.respond_with((200, {}))
    for _ in range(2):
        with http.concurrent_calls() as concurrent_calls:
            for tag in range(8):
                concurrent_calls.start(tag, endpoint.url, (f"X-Tag: {tag}",), b"%d" % tag)
            found: list[Any] = []
            while concurrent_calls:
                found += concurrent_calls.completed(5)
        assert sorted(tag for tag, _ in found) == list(range(8))
        assert all(isinstance(answer, Response) and answer.status == 200 for _, answer in found)
    assert sorted(body for _, body in endpoint.requests) == sorted([b"%d" % tag for tag in range(8)] * 2)


def test_a_concurrent_call_without_a_response_completes_with_an_error(endpoint: Endpoint, http: SignedHttp) -> None:
    """The other calls are not affected."""
    closed = f"http://127.0.0.1:{free_port()}"
    endpoint.respond_with((200, {}))
    with http.concurrent_calls() as concurrent_calls:
        concurrent_calls.start("bad", closed, (), b"")
        concurrent_calls.start("good", endpoint.url, (), b"")
        found: dict[str, Any] = {}
        while concurrent_calls:
            found.update(concurrent_calls.completed(5))
    assert isinstance(found["bad"], Unavailable)
    assert found["good"].status == 200


def test_a_call_ends_at_its_timeout() -> None:
    """A peer that sends nothing ends a single call and a concurrent one alike."""
    http = SignedHttp(service="dynamodb", region="x", credentials=Keys(), timeout=0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unavailable):
            http.send(url, body=b"")
        with http.concurrent_calls() as concurrent_calls:
            concurrent_calls.start(1, url, (), b"")
            found: list[Any] = []
            while concurrent_calls:
                found += concurrent_calls.completed(60)
        assert isinstance(found[0][1], Unavailable)
    http.close()
