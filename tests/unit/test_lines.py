"""Lines are read as they stand, and those that are too long are skipped."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdstore.model import Reason
from mdstore.settings import Settings
from mdstore.store import lines
from mdstore.store.lines import read_lines
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.validation import LineTooLong
from tests.unit.bench import Bench

LIMIT = 1_024
LONG = b"x" * 300_000


def read(text: bytes) -> list[tuple[int, Any]]:
    return list(read_lines(io.BytesIO(text), max_record_bytes=LIMIT))


@given(given_lines=st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))))
def test_lines_are_read_as_they_stand(given_lines: list[bytes]) -> None:
    """Blank lines are left out, white space around a line too, and numbers count all lines from 1."""
    expected = [(number, line.strip()) for number, line in enumerate(given_lines, 1) if line.strip()]
    assert read(b"\n".join(given_lines)) == expected
    assert read(b"\xef\xbb\xbf" + b"\r\n".join([b"", *given_lines])) == [
        (number + 1, line) for number, line in expected
    ]


@given(text=st.text("xy\n").map(str.encode), piece=st.integers(1, 9), limit=st.integers(1, 9))
def test_lines_are_found_across_pieces(text: bytes, piece: int, limit: int) -> None:
    """However a stream is cut into pieces, each line is read or skipped as a whole, and under its own number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_PIECE", piece)
        found = dict(read_lines(io.BytesIO(text), max_record_bytes=limit))
    expected = {number: line for number, line in enumerate(text.split(b"\n"), 1) if line}
    assert found.keys() == expected.keys()
    for number, line in found.items():
        if isinstance(line, LineTooLong):
            assert (line.digest, len(expected[number]) > limit) == (hashlib.sha256(expected[number]).digest(), True)
        else:
            assert (line, len(line) <= limit + piece) == (expected[number], True)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\nlast"])
def test_a_long_line_is_skipped(end: bytes) -> None:
    """In its place comes an error with its size and its digest; the lines around it are read."""
    first, found, *last = read(b"first\n" + LONG + end)
    assert (first, last) == ((1, b"first"), [(3, b"last")] if end == b"\nlast" else [])
    number, error = found
    assert (number, error.reason, error.digest) == (2, Reason.TOO_LARGE, hashlib.sha256(LONG).digest())
    assert str(error) == "data: 300000 bytes as JSON, at most 1024 are allowed"


def test_a_long_blank_line_is_blank() -> None:
    """White space of any length is no operation."""
    assert read(b" " * 300_000 + b"\n1\n" + b"\t" * 300_000) == [(2, b"1")]


@pytest.mark.parametrize("start", range(2**18 - 8, 2**18 + 8))
@pytest.mark.parametrize("name", [b'"group"', b'"gr\\u006fup"'])
def test_a_long_line_may_be_part_of_a_group(name: bytes, start: int) -> None:
    """The name of the field is found wherever it stands in the line; an escape may hide it."""
    ((_, error),) = read(b"x" * (LIMIT + start) + name + LONG)
    assert error.may_name_group
    ((_, other),) = read(b"x" * (LIMIT + start) + LONG)
    assert not other.may_name_group


@pytest.mark.parametrize("may_name_group", [False, True])
def test_a_long_line_refuses_groups_only_if_it_may_name_one(may_name_group: bool) -> None:
    """Other groups of the request apply if the line has none."""
    builder = PayloadBuilder(validator=Bench().validator, settings=Settings())
    builder.add({"op": "insert", "entity": "e", "key": "k", "data": {}, "group": "g"})
    builder.add(LineTooLong(9, limit=1, digest=b"", may_name_group=may_name_group))
    assert len(list(builder.refused_groups())) == may_name_group


def test_a_long_line_has_the_digest_of_its_bytes() -> None:
    """A repeat of a request is recognised, whether its long line was skipped or, as in release 0.1.0, read."""
    digests = set()
    for given_line in (LONG, read(LONG)[0][1]):
        builder = PayloadBuilder(validator=Bench().validator, settings=Settings(max_record_bytes=LIMIT))
        builder._validator._max_record_bytes = LIMIT
        builder.add(given_line)
        digests.add(builder.contents())
    assert len(digests) == 1
