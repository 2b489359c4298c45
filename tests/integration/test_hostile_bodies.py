"""One hostile body takes neither the memory nor the time of the HTTP API."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mdstore.local.emulator import EmbeddedAws, free_port
from tests.integration.api_process import ApiProcess, api_process

MOST_MEMORY = 300 * 2**20
MOST_SECONDS = 10.0  # two on a machine that does nothing else

_JSON, _NDJSON = "application/json", "application/x-ndjson"
_DIGITS = b"1" * 15_000_000
_INSERT = b'{"op":"insert","entity":"item","key":"k","data":'

#: The media type, the body, and the status of the answer.
BODIES: dict[str, tuple[str, bytes, int]] = {
    "60 MB that are no JSON": (_NDJSON, b'"group":"' + b"a" * 60_000_000, 422),
    "16 MB that are no JSON": (_NDJSON, b'"group":"' + b"a" * 16_000_000, 422),
    "many groups that are no JSON": (_NDJSON, b'"group":"a",' * 1_300_000, 422),
    "60 MB as an operation's name": (_NDJSON, b'{"op":[' + b"{}," * 20_000_000 + b"{}]}", 422),
    "16 MB as an operation's name": (_NDJSON, b'{"op":[' + b"{}," * 5_000_000 + b"{}]}", 422),
    "many unknown fields": (_NDJSON, b"{" + b",".join(b'"a%d":0' % n for n in range(1_200_000)) + b"}", 422),
    "15 million digits": (_NDJSON, _INSERT + b'{"n":1.' + _DIGITS + b"}}", 422),
    "15 million digits as a version": (_NDJSON, b'{"expect_version":' + _DIGITS + b"}", 422),
    "15 million digits and no JSON": (_NDJSON, b'{"n":' + _DIGITS, 422),
    "7 million digits in a JSON body": (
        _JSON,
        b'{"operations":[' + _INSERT + b'{"n":' + b"1" * 7_000_000 + b"}}]}",
        422,
    ),
    "many empty objects in a record": (_NDJSON, _INSERT + b'{"a":[' + b"{}," * 5_000_000 + b"{}]}}", 422),
    "nearly too many values, and invalid": (
        _NDJSON,
        b'{"op":"insert","data":{"a":[' + b'{"a":0.10},' * 262_000 + b"0]}}",
        422,
    ),
    "nearly too many operations": (_JSON, b'{"operations":[' + b"1," * 990_000 + b"1]}", 422),
    "2.7 million empty objects": (_JSON, b'{"operations":[' + b"{}," * 2_700_000 + b"{}]}", 422),
    "4 million numbers": (_JSON, b'{"operations":[' + b"1," * 4_000_000 + b"1]}", 422),
    "20 million empty objects": (_NDJSON, b"{}\n" * 20_000_000, 422),
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    with (
        EmbeddedAws(port=free_port()) as aws,
        api_process(aws.url, tmp_path_factory.mktemp("api") / "log") as running,
    ):
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_answered_soon_and_in_little_memory(api: ApiProcess, name: str) -> None:
    """The answer is 422 within seconds, and the process has never had more than 300 MB of memory."""
    kind, body, status = BODIES[name]
    before, used, began = api.peak(), api.processor_seconds(), time.monotonic()
    answer = api.http.post("/v1/requests", content=body, headers={"Content-Type": kind})
    seconds = time.monotonic() - began

    used = api.processor_seconds() - used
    print(f"{name}: {seconds:.2f} s, {used:.2f} s of them computing, peak {before >> 20} -> {api.peak() >> 20} MiB")
    assert (answer.status_code, len(answer.content) < 100_000) == (status, True)
    assert seconds < MOST_SECONDS
    assert api.peak() < MOST_MEMORY
