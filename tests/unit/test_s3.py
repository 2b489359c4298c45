"""Objects in S3: the URL of each, what each response means, and which calls are retried."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.clients import AwsClients, make_client
from mdstore.aws.concurrent import Task
from mdstore.aws.http import Body, Response, SignedHttp
from mdstore.aws.s3 import READS, Objects, find_bucket_url, path_url, read_again
from mdstore.errors import DeploymentBroken, IntegrityError, MdstoreError, NotFound, Unavailable
from mdstore.settings import load_settings
from tests.unit.endpoint import Endpoint, FakeTime, Keys

T = TypeVar("T")


@pytest.fixture
def objects(endpoint: Endpoint, time: FakeTime) -> Iterator[Objects]:
    http = SignedHttp(service="s3", region="us-east-1", credentials=Keys())
    url = partial(path_url, endpoint.url, "payloads")
    yield Objects(bucket="payloads", bucket_url=url, http=http, retry=time.retry(base=1, patience=5))
    http.close()


def with_settings(http: SignedHttp, **environ: str) -> Objects:
    """Return the objects of a process with these settings, whose calls go through `http`."""
    keys = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}
    found = AwsClients(load_settings({**keys, **environ}).settings).objects
    found._http = http
    return found


def on_aws(region: str, bucket: str, http: SignedHttp) -> Objects:
    return with_settings(http, MDSTORE_PROFILE="aws", AWS_REGION=region, MDSTORE_BUCKET=bucket)


@dataclass
class RecordingHttp(SignedHttp):
    """Responds with one byte, and records the requests."""

    requests: list[tuple[str, Sequence[str]]] = field(default_factory=list)

    def send(self, url: str, headers: Sequence[str] = (), body: Body = None) -> Response:
        assert body is None
        self.requests.append((url, headers))
        return Response(206, [], b"x")


def error_body(code: str) -> bytes:
    """Return S3's body of an error."""
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>text</Message></Error>'.encode()


def failure(call: Callable[[], object]) -> MdstoreError:
    with pytest.raises(MdstoreError) as caught:
        call()
    return caught.value


# -- URLs


@pytest.mark.parametrize(
    ("region", "bucket", "base_url"),
    [
        ("us-east-1", "acme-payloads", "https://acme-payloads.s3.amazonaws.com/"),
        ("eu-central-1", "acme-payloads", "https://acme-payloads.s3.eu-central-1.amazonaws.com/"),
        ("eu-central-1", "acme.payloads", "https://s3.eu-central-1.amazonaws.com/acme.payloads/"),
        ("cn-north-1", "acme-payloads", "https://acme-payloads.s3.cn-north-1.amazonaws.com.cn/"),
    ],
)
def test_on_aws_the_host_is_that_of_the_bucket_s_region(region: str, bucket: str, base_url: str) -> None:
    """Each region and each kind of bucket name has its own host; another region's host would redirect the caller."""
    http = RecordingHttp()
    assert on_aws(region, bucket, http).get("payloads/r1", 10, 20) == b"x"
    assert http.requests == [(f"{base_url}payloads/r1", ("Range: bytes=10-19",))]


@pytest.mark.parametrize("end", ["", "/", "/base", "/base/"])
def test_at_an_endpoint_the_bucket_is_part_of_the_path(end: str) -> None:
    """An emulator has no host per bucket. The path of the endpoint's URL comes first."""
    http = RecordingHttp()
    endpoint, bucket = f"http://127.0.0.1:1{end}", "acme.payloads"
    with_settings(http, AWS_ENDPOINT_URL_S3=endpoint, MDSTORE_BUCKET=bucket).get("k", 0, 1)
    assert http.requests[0][0] == f"http://127.0.0.1:1{end.rstrip('/')}/{bucket}/k"
    settings_ = load_settings({"AWS_ENDPOINT_URL_S3": endpoint}).settings
    assert find_bucket_url(make_client(settings_, "s3"), bucket) == path_url(endpoint, bucket)


@pytest.fixture(scope="module")
def recording() -> tuple[Objects, RecordingHttp]:
    http = RecordingHttp()
    return on_aws("eu-central-1", "b-1", http), http


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_key_is_encoded_as_one_path_or_refused(recording: tuple[Objects, RecordingHttp], key: str) -> None:
    """The URL decodes to the same key. A key with a part `.` or `..`, which libcurl would resolve, is never requested."""
    objects, http = recording
    http.requests.clear()
    if {".", ".."} & set(key.split("/")):
        assert isinstance(failure(lambda: objects.get(key, 0, 1)), IntegrityError)
        assert http.requests == []
        return
    objects.get(key, 0, 1)
    ((url, _),) = http.requests
    path = url.removeprefix("https://b-1.s3.eu-central-1.amazonaws.com/")
    assert unquote(path) == key
    assert re.fullmatch(r"[A-Za-z0-9%/._~-]+", path)


@pytest.mark.parametrize("key", [".", "..", "payloads/../secrets/x", "payloads/./x", "a/..", "../../x"])
def test_dot_segments_in_a_key_are_refused(recording: tuple[Objects, RecordingHttp], key: str) -> None:
    """A key that could leave its prefix or bucket raises `IntegrityError`, and no request is made."""
    objects, http = recording
    http.requests.clear()
    assert isinstance(failure(lambda: objects.get(key, 0, 1)), IntegrityError)
    assert http.requests == []


@pytest.mark.parametrize("key", ["payloads/...", "payloads/a..b", "payloads/.a", "payloads/a."])
def test_dots_within_a_segment_are_kept(recording: tuple[Objects, RecordingHttp], key: str) -> None:
    """Only whole segments would be resolved."""
    objects, http = recording
    http.requests.clear()
    objects.get(key, 0, 1)
    assert http.requests[0][0].endswith(f"/{key}")


# -- reads


def test_a_read_requests_the_given_range(endpoint: Endpoint, objects: Objects) -> None:
    """`end` is exclusive. A response with the whole object and one with a part of it are both accepted."""
    for status in (206, 200):
        endpoint.respond_with((status, b"0123456789"))
        assert objects.get("payloads/r1", 100, 110) == b"0123456789"
    assert {headers["range"] for headers, _ in endpoint.requests} == {"bytes=100-109"}
    assert set(endpoint.lines) == {"GET /payloads/payloads/r1 HTTP/1.1"}


def test_a_range_beyond_the_end_is_empty(endpoint: Endpoint, objects: Objects) -> None:
    """A range that the object does not have returns no bytes, and is not an error."""
    endpoint.respond_with((416, error_body("InvalidRange")))
    assert objects.get("payloads/r1", 100, 110) == b""
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("body", [error_body("NoSuchKey"), b""], ids=["NoSuchKey", "no body"])
def test_a_missing_object_is_not_found(endpoint: Endpoint, objects: Objects, body: bytes) -> None:
    """The error names the key, and the call is not retried."""
    endpoint.respond_with((404, body))
    error = failure(lambda: objects.get("payloads/r1", 0, 1))
    assert isinstance(error, NotFound)
    assert (error.kind, error.name) == ("object", "payloads/r1")
    assert len(endpoint.requests) == 1


def response_body(code: str) -> bytes:
    """Return the body of an error; it is a proxy's if the code is only an HTTP status."""
    return b"<html>text</html>" if code.startswith("HTTP") else error_body(code)


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
def test_retryable_errors_are_retried_until_the_patience_ends(
    endpoint: Endpoint, objects: Objects, time: FakeTime, status: int, code: str
) -> None:
    """SlowDown and any 5xx may be temporary; the last error names its code and the key."""
    endpoint.respond_with((status, response_body(code)))
    error = failure(lambda: objects.get("payloads/r1", 0, 1))
    assert isinstance(error, Unavailable)
    assert error.code == code
    assert "payloads/r1" in str(error)
    assert time.slept == [1, 2]
    assert len(endpoint.requests) == 3


def test_a_read_succeeds_after_temporary_failures(endpoint: Endpoint, objects: Objects, time: FakeTime) -> None:
    """The caller does not notice a throttle or a broken connection that was temporary."""
    endpoint.respond_with((503, error_body("SlowDown")), (0, b""), (206, b"x"))
    assert objects.get("payloads/r1", 0, 1) == b"x"
    assert time.slept == [1]  # libcurl itself replaces a reused connection that was closed


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
def test_permanent_errors_raise_deployment_broken(
    endpoint: Endpoint, objects: Objects, time: FakeTime, status: int, code: str
) -> None:
    """A missing permission, or a missing or misplaced bucket, is not the message's fault; it is not retried."""
    endpoint.respond_with((status, response_body(code)))
    error = failure(lambda: objects.get("payloads/r1", 0, 1))
    assert type(error) is DeploymentBroken
    assert error.code == code
    assert time.slept == []
    assert len(endpoint.requests) == 1


# -- writes


@pytest.mark.parametrize("make", [bytes, io.BytesIO])
def test_an_object_is_stored_only_if_the_key_is_free(
    endpoint: Endpoint, objects: Objects, make: Callable[[bytes], bytes | io.BytesIO]
) -> None:
    """S3 itself checks the condition, so that only one of two writers can win; for the other one it is not an error."""
    endpoint.respond_with((200, b""), (412, error_body("PreconditionFailed")))
    assert objects.put_new("payloads/r1", make(b"whole")) is True
    assert objects.put_new("payloads/r1", make(b"whole")) is False
    assert set(endpoint.lines) == {"PUT /payloads/payloads/r1 HTTP/1.1"}
    assert {headers["if-none-match"] for headers, _ in endpoint.requests} == {"*"}


def test_every_try_of_a_write_sends_the_whole_body(endpoint: Endpoint, objects: Objects, time: FakeTime) -> None:
    """A file that the first try read to its end is read from its beginning by the next try."""
    endpoint.respond_with((503, error_body("SlowDown")), (200, b""))
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
def test_a_failed_write_names_the_code(
    endpoint: Endpoint, objects: Objects, status: int, code: str, kind: type[MdstoreError], tries: int
) -> None:
    """Only this package's retry policy applies; boto3's own would multiply the tries."""
    endpoint.respond_with((status, error_body(code)))
    error = failure(lambda: objects.put_new("payloads/r1", b"x"))
    assert type(error) is kind
    assert getattr(error, "code", None) == code
    assert len(endpoint.requests) == tries


# -- reading again


def result_of(task: Task[T]) -> T:
    """Run a task that makes no calls."""
    with pytest.raises(StopIteration) as end:
        next(task)
    found: T = end.value.value
    return found


@pytest.mark.parametrize("damaged", range(READS))
def test_damaged_content_is_read_again(damaged: int) -> None:
    """The first undamaged read counts, and is the last one."""
    reads = iter([IntegrityError("damaged")] * damaged + ["whole", "never read"])

    def read() -> Task[str]:
        yield from ()
        found = next(reads)
        if isinstance(found, IntegrityError):
            raise found
        return str(found)

    assert result_of(read_again(read)) == "whole"
    assert next(reads) == "never read"


def test_content_that_stays_damaged_is_read_three_times() -> None:
    """The caller gets the last error."""
    tries = iter(range(10))

    def read() -> Task[None]:
        yield from ()
        raise IntegrityError(f"try {next(tries)}")

    assert str(failure(lambda: result_of(read_again(read)))) == "try 2"
    assert next(tries) == READS == 3


def test_other_errors_are_not_read_again() -> None:
    """An error that does not concern the content is raised at once."""
    tries = iter(range(10))

    def read() -> Task[None]:
        yield from ()
        raise NotFound("object", f"try {next(tries)}")

    assert "try 0" in str(failure(lambda: result_of(read_again(read))))
