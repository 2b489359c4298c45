"""Signed calls: the signature is the one that botocore makes, and connections are kept."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pycurl
import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest

from mdstore.aws.http import Answer, SignedHttp
from mdstore.errors import ConfigurationError, Unavailable
from mdstore.local.emulator import free_port
from tests.unit.endpoint import Endpoint, Keys


def libcurl(patch: pytest.MonkeyPatch, number: int, *protocols: str) -> None:
    """Have pycurl say that it brings another libcurl."""
    patch.setattr(pycurl, "version_info", lambda: (11, "", number, "Linux", 0, "", 0, "", protocols))
    patch.setattr(pycurl, "version", "PycURL/7.45.3 libcurl/7.61.1")


@pytest.mark.parametrize("number", [0x080B01, 0x080C00, 0x090000])
def test_a_libcurl_from_8_11_1_on_will_do(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The version is compared as numbers."""
    libcurl(monkeypatch, number, "http", "https")
    SignedHttp(service="s3", region="x", credentials=Keys()).close()


@pytest.mark.parametrize(
    ("number", "protocols"), [(0x080B00, ["http", "https"]), (0x075801, ["http", "https"]), (0x080B01, ["http"])]
)
def test_a_libcurl_that_cannot_do_it_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, number: int, protocols: list[str]
) -> None:
    """What is too old signs wrongly or not at all, and some have no TLS; the error says what is there and what is needed."""
    libcurl(monkeypatch, number, *protocols)
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
    """What botocore's own signer makes of a request as it came over the wire."""
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
    """Method, headers, session token and body are in the signature, as AWS computes it."""
    endpoint.says((200, {}))
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
    """S3 has its own rules for paths and for the digest of the body; a range is part of the call."""
    endpoint.says((206, b"x"))
    http = SignedHttp(service="s3", region="eu-central-1", credentials=Keys())
    assert http.send(f"{endpoint.url}/bucket/{key}", ("Range: bytes=0-9",)).body == b"x"
    http.close()
    ((headers, body),) = endpoint.requests
    assert endpoint.lines == [f"GET /bucket/{key} HTTP/1.1"]
    assert headers["range"] == "bytes=0-9"
    signer = S3SigV4Auth(Keys().get_frozen_credentials(), "s3", "eu-central-1")
    wanted = expected_signature(signer, endpoint.url, endpoint.lines[0], headers, body)
    assert headers["authorization"].endswith(f"Signature={wanted}")


def test_an_answer_is_whatever_was_said(endpoint: Endpoint, http: SignedHttp) -> None:
    """Status, headers in any case, and body come back, also of an error."""
    endpoint.says((418, b"teapot", {"X-Amz-Crc32": " 17 "}))
    answer = http.send(endpoint.url, body=b"")
    assert (answer.status, answer.body) == (418, b"teapot")
    assert answer.header(b"x-amz-crc32:") == b"17"
    assert answer.header(b"x-other:") is None


def test_the_secret_is_not_sent(endpoint: Endpoint, http: SignedHttp) -> None:
    """Only what is derived from the secret key leaves the process."""
    endpoint.says((200, {}))
    http.send(endpoint.url, body=b"x")
    assert "secret" not in repr(endpoint.requests)


def test_calls_at_the_same_time_come_back_with_their_tags(endpoint: Endpoint, http: SignedHttp) -> None:
    """Each answer is its own call's, and connections serve the next round."""
    endpoint.says((200, {}))
    for _ in range(2):
        with http.concurrent_calls() as concurrent_calls:
            for tag in range(8):
                concurrent_calls.start(tag, endpoint.url, (f"X-Tag: {tag}",), b"%d" % tag)
            found: list[Any] = []
            while concurrent_calls:
                found += concurrent_calls.completed(5)
        assert sorted(tag for tag, _ in found) == list(range(8))
        assert all(isinstance(answer, Answer) and answer.status == 200 for _, answer in found)
    assert sorted(body for _, body in endpoint.requests) == sorted([b"%d" % tag for tag in range(8)] * 2)


def test_a_call_without_answer_is_an_error_of_its_tag(endpoint: Endpoint, http: SignedHttp) -> None:
    """One that fails leaves the others alone."""
    nobody = f"http://127.0.0.1:{free_port()}"
    endpoint.says((200, {}))
    with http.concurrent_calls() as concurrent_calls:
        concurrent_calls.start("bad", nobody, (), b"")
        concurrent_calls.start("good", endpoint.url, (), b"")
        found: dict[str, Any] = {}
        while concurrent_calls:
            found.update(concurrent_calls.completed(5))
    assert isinstance(found["bad"], Unavailable)
    assert found["good"].status == 200


def test_a_call_ends_at_its_timeout() -> None:
    """A peer that says nothing is given up, one by one and at the same time alike."""
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
