"""A line of any length, in any file, takes little memory, and is refused as the line that it is."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from mdstore.client import Client
from mdstore.local.stack import Stack
from tests.processes import peak_memory

LONG = 200_000_000  # bytes
LIMIT = 300 * 2**20  # bytes of memory
RECORD = ("--entity", "long", "--key", "id")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A finished `mdstore load`, with the most bytes of memory that it had."""

    code: int
    out: str
    err: str
    peak: int


def load(stack: Stack, directory: Path, *arguments: str, stdin: IO[bytes] | None = None) -> Loaded:
    out, err = directory / "out", directory / "err"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        command = [sys.executable, "-m", "mdstore", "load", *arguments]
        started = subprocess.Popen(command, env=stack.environ, stdin=stdin, stdout=out_file, stderr=err_file)
        most = 0
        while started.poll() is None:
            most = max(most, peak_memory(started.pid))
            time.sleep(0.02)
    return Loaded(code=started.returncode, out=out.read_text(), err=err.read_text(), peak=most)


def insert(key: str, **more: Any) -> bytes:
    return json.dumps({"op": "upsert", "entity": "long", "key": key, "data": {}, **more}).encode()


def written(path: Path, start: bytes, end: bytes) -> Path:
    """Write `start`, a long run of `a`, and `end`."""
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(start)
        for _ in range(LONG // 1_000_000):
            file.write(b"a" * 1_000_000)
        file.write(end)
    return path


def check_refused(client: Client, loaded: Loaded, request_id: str, size: int) -> None:
    """Check that exactly the second line was refused, with its size, and that the lines around it were applied."""
    assert loaded.code == 3, loaded.err
    assert loaded.peak < LIMIT, f"{loaded.peak >> 20} MiB"
    assert client.status(request_id).counts.applied == {"upsert": 2}
    assert [(one.index, one.reason, one.detail) for one in client.outcomes(request_id, only="refused")] == [
        (1, "too_large", f"data: {size} bytes as JSON, at most 16777216 are allowed")
    ]


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz", "-"])
def test_a_long_line_is_refused_and_the_others_apply(stack: Stack, client: Client, tmp_path: Path, name: str) -> None:
    """A line of 200 MB in a plain file, a gzip file of 1 MB, or standard input is refused with its size."""
    before, after = insert("before", group="g"), insert("after", group="g")
    path = written(tmp_path / name.replace("-", "input"), before + b'\n{"op":"', b'"}\r\n' + after)
    request_id = f"long/{name}"
    with path.open("rb") as opened:
        argument, stdin = ("-", opened) if name == "-" else (str(path), None)
        loaded = load(stack, tmp_path, argument, "--request-id", request_id, stdin=stdin)
        check_refused(client, loaded, request_id, LONG + 9)
        repeated = load(stack, tmp_path, str(path) if name != "-" else "-", "--request-id", request_id, "--json")
        assert name == "-" or json.loads(repeated.out)["new"] is False


def test_a_long_json_record_is_refused(stack: Stack, client: Client, tmp_path: Path) -> None:
    """A long line of a file of plain records is refused too."""
    path = written(tmp_path / "records.jsonl", b'{"id":"1"}\n{"id":"', b'"}\n{"id":"2"}')
    loaded = load(stack, tmp_path, str(path), *RECORD, "--request-id", "long/records")
    check_refused(client, loaded, "long/records", LONG + 9)


@pytest.mark.parametrize("values", [b"{},", b'"a",'])
def test_a_record_of_too_many_values_is_refused(stack: Stack, client: Client, tmp_path: Path, values: bytes) -> None:
    """16 MB of small values would take 400 MB of memory when they are decoded."""
    path = tmp_path / "values.jsonl"
    path.write_bytes(b'{"id":"1"}\n{"id":"3","a":[' + values * (16_000_000 // len(values)) + b'0]}\n{"id":"2"}')
    request_id = f"values/{len(values)}"
    loaded = load(stack, tmp_path, str(path), *RECORD, "--request-id", request_id)
    assert (loaded.code, client.status(request_id).counts.applied) == (3, {"upsert": 2}), loaded.err
    assert loaded.peak < LIMIT, f"{loaded.peak >> 20} MiB"
    refused = [one.detail for one in client.outcomes(request_id, only="refused")]
    assert refused == ["line: not a JSON object: more than 524288 values"]


@pytest.mark.parametrize(
    ("start", "end"),
    [(b"id,name\n1,", b"\n2,b\n"), (b'id,name\n1,"', b'"\n2,b\n'), (b"id,", b"\n1,b\n"), (b'id,name\n1,"', b"")],
)
def test_a_long_row_of_csv_is_an_error(stack: Stack, tmp_path: Path, start: bytes, end: bytes) -> None:
    """A row of 200 MB, in the header or below, is an error with file and line, and nothing is sent."""
    path = written(tmp_path / "long.csv", start, end)
    loaded = load(stack, tmp_path, str(path), *RECORD)
    assert loaded.code not in (0, 3)
    line = 1 + start.count(b"\n")
    assert f"line {line}" in " ".join(loaded.err.split())
    assert "a row of more than 16777216 characters" in " ".join(loaded.err.split())
    assert loaded.peak < LIMIT, f"{loaded.peak >> 20} MiB"


def test_a_row_of_very_many_lines_is_an_error(stack: Stack, tmp_path: Path) -> None:
    """A quoted value of many lines counts as a whole."""
    path = tmp_path / "lines.csv"
    path.write_bytes(b'id,name\n1,"' + b"a,\n" * 40_000_000 + b'"\n')
    loaded = load(stack, tmp_path, str(path), *RECORD)
    assert "a row of more than 16777216 characters" in " ".join(loaded.err.split())
    assert loaded.peak < LIMIT, f"{loaded.peak >> 20} MiB"


def test_a_long_line_that_is_not_utf8_is_named(stack: Stack, tmp_path: Path) -> None:
    """To find the line of an encoding error takes little memory too."""
    path = written(tmp_path / "bytes.csv", b"id,name\n1,\xff\n2,", b"\n")
    loaded = load(stack, tmp_path, str(path), *RECORD)
    assert "line 2" in " ".join(loaded.err.split())
    assert loaded.peak < LIMIT, f"{loaded.peak >> 20} MiB"
