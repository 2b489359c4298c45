"""Objects in S3: where they are looked for, what each answer means, and what is tried again."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import unquote

import botocore.session
import pytest
from boto3.session import Session
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.clients import make_client
from mdstore.aws.http import Answer, Body, SignedHttp
from mdstore.aws.s3 import READS, Objects, read_again
from mdstore.errors import DeploymentBroken, IntegrityError, MdstoreError, NotFound, Unavailable
from mdstore.settings import load_settings
from tests.unit.endpoint import Endpoint, FakeTime, Keys


@cache
def loader() -> Any:
    """One for all clients: what it has read of S3 takes half a second."""
    return botocore.session.Session().get_component("data_loader")


def client(environ: dict[str, str]) -> tuple[Any, str]:
    """A client of S3, and its region."""
    found = load_settings(environ).settings
    core = botocore.session.Session()
    core.register_component("data_loader", loader())
    core.set_credentials("AKIDEXAMPLE", "secret")
    return make_client(found, "s3", Session(region_name=found.region, botocore_session=core)), found.region


@pytest.fixture
def objects(endpoint: Endpoint, time: FakeTime) -> Iterator[Objects]:
    s3, region = client({"AWS_ENDPOINT_URL": endpoint.url})
    http = SignedHttp(service="s3", region=region, credentials=Keys())
    yield Objects(client=s3, http=http, bucket="payloads", retry=time.retry(base=1, patience=5))
    http.close()


def on_aws(region: str, bucket: str, http: SignedHttp) -> Objects:
    s3, _ = client({"MDSTORE_PROFILE": "aws", "AWS_REGION": region, "MDSTORE_BUCKET": bucket})
    return Objects(client=s3, http=http, bucket=bucket)


@dataclass
class NotedHttp(SignedHttp):
    """Answers with one byte, and keeps what it was asked for."""

    asked: list[tuple[str, Sequence[str]]] = field(default_factory=list)

    def send(self, url: str, headers: Sequence[str] = (), body: Body = None) -> Answer:
        assert body is None
        self.asked.append((url, headers))
        return Answer(206, [], b"x")


def refusal(code: str) -> bytes:
    """S3's body of an error."""
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>words</Message></Error>'.encode()


def failure(call: Callable[[], object]) -> MdstoreError:
    with pytest.raises(MdstoreError) as caught:
        call()
    return caught.value


# -- where


@pytest.mark.parametrize(
    ("region", "bucket", "place"),
    [
        ("us-east-1", "acme-payloads", "https://acme-payloads.s3.amazonaws.com/"),
        ("eu-central-1", "acme-payloads", "https://acme-payloads.s3.eu-central-1.amazonaws.com/"),
        ("eu-central-1", "acme.payloads", "https://s3.eu-central-1.amazonaws.com/acme.payloads/"),
        ("cn-north-1", "acme-payloads", "https://acme-payloads.s3.cn-north-1.amazonaws.com.cn/"),
    ],
)
def test_on_aws_the_bucket_s_own_region_is_asked(region: str, bucket: str, place: str) -> None:
    """Each region and each kind of bucket name has its host; another region's would send the caller on."""
    http = NotedHttp()
    assert on_aws(region, bucket, http).get("payloads/r1", 10, 20) == b"x"
    assert http.asked == [(f"{place}payloads/r1", ("Range: bytes=10-19",))]


@pytest.mark.parametrize("end", ["", "/", "/base", "/base/"])
def test_at_an_endpoint_the_bucket_is_a_part_of_the_path(end: str) -> None:
    """An emulator has no host for each bucket; whatever path its URL has comes first."""
    http = NotedHttp()
    s3, _ = client({"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:1{end}"})
    Objects(client=s3, http=http, bucket="acme.payloads").get("k", 0, 1)
    assert http.asked[0][0] == f"http://127.0.0.1:1{end.rstrip('/')}/acme.payloads/k"


@pytest.fixture(scope="module")
def noted() -> tuple[Objects, NotedHttp]:
    http = NotedHttp()
    return on_aws("eu-central-1", "b-1", http), http


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_key_is_one_path_or_refused(noted: tuple[Objects, NotedHttp], key: str) -> None:
    """A key comes back from its URL as it is; one with a part that libcurl would resolve, `.` or `..`, is never asked for."""
    objects, http = noted
    http.asked.clear()
    if {".", ".."} & set(key.split("/")):
        assert isinstance(failure(lambda: objects.get(key, 0, 1)), IntegrityError)
        assert http.asked == []
        return
    objects.get(key, 0, 1)
    ((url, _),) = http.asked
    path = url.removeprefix("https://b-1.s3.eu-central-1.amazonaws.com/")
    assert unquote(path) == key
    assert re.fullmatch(r"[A-Za-z0-9%/._~-]+", path)


@pytest.mark.parametrize("key", [".", "..", "payloads/../secrets/x", "payloads/./x", "a/..", "../../x"])
def test_dots_as_a_part_of_a_key_are_refused(noted: tuple[Objects, NotedHttp], key: str) -> None:
    """A key that would be resolved out of its prefix, or its bucket, is not to be trusted, and nobody is asked for it."""
    objects, http = noted
    http.asked.clear()
    assert isinstance(failure(lambda: objects.get(key, 0, 1)), IntegrityError)
    assert http.asked == []


@pytest.mark.parametrize("key", ["payloads/...", "payloads/a..b", "payloads/.a", "payloads/a."])
def test_dots_within_a_part_are_text(noted: tuple[Objects, NotedHttp], key: str) -> None:
    """Only whole parts are resolved."""
    objects, http = noted
    http.asked.clear()
    objects.get(key, 0, 1)
    assert http.asked[0][0].endswith(f"/{key}")


# -- reads


def test_a_read_is_of_the_bytes_asked_for(endpoint: Endpoint, objects: Objects) -> None:
    """`end` is exclusive; the whole object and a part of it are both answers."""
    for status in (206, 200):
        endpoint.says((status, b"0123456789"))
        assert objects.get("payloads/r1", 100, 110) == b"0123456789"
    assert {headers["range"] for headers, _ in endpoint.requests} == {"bytes=100-109"}
    assert set(endpoint.lines) == {"GET /payloads/payloads/r1 HTTP/1.1"}


def test_a_range_behind_the_end_is_empty(endpoint: Endpoint, objects: Objects) -> None:
    """What an object does not have is no bytes, and no error."""
    endpoint.says((416, refusal("InvalidRange")))
    assert objects.get("payloads/r1", 100, 110) == b""
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("body", [refusal("NoSuchKey"), b""], ids=["NoSuchKey", "no body"])
def test_an_object_that_is_not_there_is_not_found(endpoint: Endpoint, objects: Objects, body: bytes) -> None:
    """It is said once, and names the key."""
    endpoint.says((404, body))
    error = failure(lambda: objects.get("payloads/r1", 0, 1))
    assert isinstance(error, NotFound)
    assert (error.kind, error.name) == ("object", "payloads/r1")
    assert len(endpoint.requests) == 1


def said(code: str) -> bytes:
    """The body of an error: a proxy's where the code is only its HTTP status."""
    return b"<html>words</html>" if code.startswith("HTTP") else refusal(code)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (400, "RequestTimeout"),
        (503, "HTTP503"),
        (502, "HTTP502"),
    ],
)
def test_not_now_is_tried_again_until_the_patience_ends(
    endpoint: Endpoint, objects: Objects, time: FakeTime, status: int, code: str
) -> None:
    """SlowDown, and whatever is a 5xx, may be gone later; the last error names its code and key."""
    endpoint.says((status, said(code)))
    error = failure(lambda: objects.get("payloads/r1", 0, 1))
    assert isinstance(error, Unavailable)
    assert error.code == code
    assert "payloads/r1" in str(error)
    assert time.slept == [1, 2]
    assert len(endpoint.requests) == 3


def test_what_was_not_now_is_had_later(endpoint: Endpoint, objects: Objects, time: FakeTime) -> None:
    """The caller does not hear of a refusal that passed; nor of a connection that was cut."""
    endpoint.says((503, refusal("SlowDown")), (0, b""), (206, b"x"))
    assert objects.get("payloads/r1", 0, 1) == b"x"
    assert time.slept == [1]  # libcurl itself replaces a kept connection that was closed


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (404, "NoSuchBucket"),
        (301, "PermanentRedirect"),
        (403, "SignatureDoesNotMatch"),
        (403, "HTTP403"),
    ],
)
def test_never_like_this_is_a_broken_deployment(
    endpoint: Endpoint, objects: Objects, time: FakeTime, status: int, code: str
) -> None:
    """No permission, no bucket, or one elsewhere: not the message's fault, said once, with its code."""
    endpoint.says((status, said(code)))
    error = failure(lambda: objects.get("payloads/r1", 0, 1))
    assert type(error) is DeploymentBroken
    assert error.code == code
    assert time.slept == []
    assert len(endpoint.requests) == 1


# -- writes


@pytest.mark.parametrize("make", [bytes, io.BytesIO])
def test_a_new_object_is_stored_unless_there_is_one(
    endpoint: Endpoint, objects: Objects, make: Callable[[bytes], bytes | io.BytesIO]
) -> None:
    """The condition is S3's own, so that two writers cannot both win; the loser is told so, and it is no error."""
    endpoint.says((200, b""), (412, refusal("PreconditionFailed")))
    assert objects.put_new("payloads/r1", make(b"whole")) is True
    assert objects.put_new("payloads/r1", make(b"whole")) is False
    assert set(endpoint.lines) == {"PUT /payloads/payloads/r1 HTTP/1.1"}
    assert {headers["if-none-match"] for headers, _ in endpoint.requests} == {"*"}


def test_every_try_of_a_write_sends_the_whole(endpoint: Endpoint, objects: Objects, time: FakeTime) -> None:
    """A file that was read to its end by the first try is read from its beginning by the next."""
    endpoint.says((503, refusal("SlowDown")), (200, b""))
    file = io.BytesIO(b"whole")
    file.seek(5)
    assert objects.put_new("payloads/r1", file) is True
    assert [b"whole" in body for _, body in endpoint.requests] == [True, True]
    assert time.slept == [1]


@pytest.mark.parametrize(
    ("status", "code", "kind", "tries"),
    [
        (503, "SlowDown", Unavailable, 3),
        (409, "ConditionalRequestConflict", Unavailable, 3),
        (403, "AccessDenied", DeploymentBroken, 1),
        (404, "NoSuchBucket", DeploymentBroken, 1),
    ],
)
def test_a_write_that_is_refused_says_why(
    endpoint: Endpoint, objects: Objects, status: int, code: str, kind: type[MdstoreError], tries: int
) -> None:
    """There is one policy of trying again: boto3's own would multiply it."""
    endpoint.says((status, refusal(code)))
    error = failure(lambda: objects.put_new("payloads/r1", b"x"))
    assert type(error) is kind
    assert getattr(error, "code", None) == code
    assert len(endpoint.requests) == tries


# -- reading again


@pytest.mark.parametrize("damaged", range(READS))
def test_what_is_damaged_is_read_again(damaged: int) -> None:
    """The first whole one counts, and is the last that is read."""
    reads = iter([IntegrityError("damaged")] * damaged + ["whole", "never read"])

    def read() -> str:
        found = next(reads)
        if isinstance(found, IntegrityError):
            raise found
        return str(found)

    assert read_again(read) == "whole"
    assert next(reads) == "never read"


def test_what_stays_damaged_is_read_three_times() -> None:
    """The last error is the caller's."""
    tries = iter(range(10))

    def read() -> None:
        raise IntegrityError(f"try {next(tries)}")

    assert str(failure(lambda: read_again(read))) == "try 2"
    assert next(tries) == READS == 3


def test_what_is_not_damaged_is_read_once() -> None:
    """Another error is not that of the bytes."""
    tries = iter(range(10))

    def read() -> None:
        raise NotFound("object", f"try {next(tries)}")

    assert "try 0" in str(failure(lambda: read_again(read)))
