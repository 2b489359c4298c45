"""Files in all formats, as a user loads them: what they hold arrives, and what they must not hold is refused by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from mdstore.client import Client
from mdstore.errors import NotFound
from tests.acceptance.conftest import Cli

ROWS = ("--entity", "row", "--key", "id")


def written(path: Path, content: str | bytes) -> str:
    """Write a file, and return its path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(path: Path, columns: dict[str, Any]) -> str:
    """Write a Parquet file, and return its path."""
    parquet.write_table(pa.table(columns), path)
    return str(path)


def is_absent(client: Client, key: str) -> bool:
    """Whether there is no record `row`/`key`."""
    try:
        client.get("row", key)
    except NotFound:
        return True
    return False


NO_CSV = {
    "open quote": (b'id,name\n1,"Alice\n2,Bob\n', "line 2"),
    "text after a quote": (b'id,name\n0,Zoe\n1,"Alice"x\n', "line 3"),
    "cut inside of quotes": (b'id,name\n0,Zoe\n1,"Ali', "line 3"),
    "backslash escapes": (b'id,name\n1,"a \\"b\\" c"\n', "line 2"),
    "Latin-1": (b"id,name\n0,Zoe\n1,Ren\xe9\n", "line 3"),
    "UTF-16": ("id,name\n1,Zoe\n".encode("utf-16"), "line 1"),
}


@pytest.mark.parametrize(("content", "line"), NO_CSV.values(), ids=NO_CSV.keys())
def test_what_is_no_csv_sends_nothing(cli: Cli, client: Client, tmp_path: Path, content: bytes, line: str) -> None:
    """A file that is not CSV in UTF-8 is an error with file and line, and no row of it is applied."""
    path = written(tmp_path / "rows.csv", content)

    ran = cli("load", path, *ROWS, "--request-id", "no-csv")

    assert ran.code == 1
    assert f"'{path}, {line}'" in ran.err
    assert cli("status", "no-csv").code == 4
    assert is_absent(client, "0")


def test_the_dialect_with_backslashes(cli: Cli, client: Client, tmp_path: Path) -> None:
    """With `--csv-dialect backslash`, a backslash takes the next character as it is; RFC 4180 doubles quotes."""
    path = written(tmp_path / "rows.csv", 'id,name\nb1,"a \\"b\\" c"\nb2,d\\\\e\n')
    assert cli("load", path, *ROWS, "--csv-dialect", "backslash").code == 0
    assert [client.get("row", key).data for key in ("b1", "b2")] == [{"name": 'a "b" c'}, {"name": "d\\e"}]
    path = written(tmp_path / "rows.csv", 'id,name\ns1,"a ""b"" c"\ns2,"two\r\nlines, one value"\n')
    assert cli("load", path, *ROWS).code == 0
    assert [client.get("row", key).data for key in ("s1", "s2")] == [
        {"name": 'a "b" c'},
        {"name": "two\r\nlines, one value"},
    ]


@pytest.mark.parametrize(
    ("header", "twice"), [("id,phone,phone", "phone"), ("id,phone,id", "id"), ("id,,", ""), ("id,a,a,id", "id, a")]
)
def test_a_column_named_twice_is_refused(cli: Cli, tmp_path: Path, header: str, twice: str) -> None:
    """The value of one of the columns would be lost, so nothing is sent; the error names the column."""
    path = written(tmp_path / "rows.csv", f"{header}\n{','.join('1234'[: header.count(',') + 1])}\n")
    ran = cli("load", path, *ROWS)
    assert ran.code == 1
    assert f"expected columns that are named once in {path}, got '{twice}'" in ran.err


def test_a_name_twice_in_parquet_and_json_is_refused(cli: Cli, client: Client, tmp_path: Path) -> None:
    """Parquet columns, fields of a Parquet struct, and names of a JSON record: none may occur twice."""
    path = str(tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_arrays([pa.array(["p1"])] * 3, names=["id", "a", "a"]), path)
    ran = cli("load", path, *ROWS)
    assert (ran.code, f"named once in {path}, got 'a'" in ran.err) == (1, True)
    path = written(
        tmp_path / "rows.jsonl", '{"id":"j1","a":1,"a":2}\n{"id":"j2","a":{"b":1,"b":2}}\n{"id":"j3","a":1}\n'
    )
    ran = cli("load", path, *ROWS)
    assert ran.code == 3
    assert "line 1: ? ?/?: refused invalid (a: the object has this name twice)" in ran.out
    assert "line 2: ? ?/?: refused invalid (b: the object has this name twice)" in ran.out
    assert client.get("row", "j3").data == {"a": 1}


def test_rows_of_parquet_are_data_and_never_operations(cli: Cli, client: Client, tmp_path: Path) -> None:
    """Columns `op`, `key` and `entity` are data; a key column that is missing or of another type is refused."""
    cli("load", written(tmp_path / "rows.csv", "id,name\nkept,Kept\n"), *ROWS)
    path = table(tmp_path / "rows.parquet", {"op": ["delete"], "entity": ["row"], "key": ["kept"]})
    ran = cli("load", path, *ROWS)
    assert (ran.code, "--key: expected one of the columns op, entity, key" in ran.err) == (1, True)
    assert client.get("row", "kept").data == {"name": "Kept"}
    path = table(tmp_path / "rows.parquet", {"op": ["delete"], "id": ["kept"]})
    assert cli("load", path, *ROWS).code == 0
    assert client.get("row", "kept").data == {"op": "delete"}


@pytest.mark.parametrize("key", [[b"k1"], [1.0], [["k"]], [True], [Decimal("1")], [date(2026, 1, 1)]])
def test_keys_are_text_or_integers(cli: Cli, tmp_path: Path, key: list[Any]) -> None:
    """Any other key column is refused by name and type: it has no one form as text."""
    ran = cli("load", table(tmp_path / "rows.parquet", {"id": key, "n": [1]}), *ROWS)
    assert (ran.code, "--key: expected a column of text or integers" in ran.err) == (1, True)


def test_integer_keys(cli: Cli, client: Client, tmp_path: Path) -> None:
    """An integer is a key, in Parquet and in JSON; another number in JSON is refused, with its line."""
    assert cli("load", table(tmp_path / "rows.parquet", {"id": [-71], "n": [1]}), *ROWS).code == 0
    path = written(tmp_path / "rows.jsonl", '{"id":72,"n":1}\n\n{"id":73.0,"n":1}\n{"id":null}\n{"n":1}\n[1]\n{"id"')
    ran = cli("load", path, *ROWS)
    assert [client.get("row", key).data for key in ("-71", "72")] == [{"n": 1}] * 2
    assert ran.code == 3
    lines = [
        line.strip().partition(" upsert")[0].partition(":")[0]
        for line in ran.out.splitlines()
        if "refused invalid" in line
    ]
    assert lines == ["line 3", "line 4", "line 5", "line 6", "line 7"]


def test_types_of_parquet_become_json_by_one_rule(cli: Cli, client: Client, tmp_path: Path) -> None:
    """Decimals are exact numbers; dates, times and timestamps are ISO 8601; binary values are base64."""
    columns = {
        "id": ["types"],
        "decimal": [Decimal("12345678901234567890.123456789")],
        "day": [date(2026, 1, 31)],
        "time": [time(1, 2, 3, 500_000)],
        "local": [datetime(2026, 1, 31, 12)],  # without a zone on purpose
        "moment": [datetime(2026, 1, 31, 12, 0, 0, 120_000, UTC)],
        "nanoseconds": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        "binary": [b"\x00\xff"],
        "list": [[b"k1", None]],
        "struct": [{"day": date(1, 1, 1)}],
        "nothing": pa.array([None], pa.string()),
    }
    ran = cli("load", table(tmp_path / "rows.parquet", columns), *ROWS)
    assert ran.code == 0, ran.err
    assert client.get("row", "types").data == {
        "decimal": Decimal("12345678901234567890.123456789"),
        "day": "2026-01-31",
        "time": "01:02:03.5",
        "local": "2026-01-31T12:00:00",
        "moment": "2026-01-31T12:00:00.12Z",
        "nanoseconds": "2023-11-14T22:13:20.123456789",
        "binary": "AP8=",
        "list": ["azE=", None],
        "struct": {"day": "0001-01-01"},
        "nothing": None,
    }


def test_a_date_that_iso_8601_cannot_write_refuses_its_row(cli: Cli, client: Client, tmp_path: Path) -> None:
    """A date past the year 9999 makes its row a refusal, with row and column; the other rows apply."""
    days = pa.array([10_000_000, 0], pa.date32())
    ran = cli("load", table(tmp_path / "rows.parquet", {"id": ["far", "near"], "day": days}), *ROWS)
    assert ran.code == 3
    assert "row 1: ? ?/?: refused invalid (data.day: a date outside of the years 1 to 9999)" in ran.out
    assert client.get("row", "near").data == {"day": "1970-01-01"}


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_damaged_parquet_file_is_an_error_with_its_name(cli: Cli, tmp_path: Path, damage: str, as_json: bool) -> None:
    """An empty, cut or foreign file is the package's own error, also with `--json`."""
    path = tmp_path / "rows.parquet"
    table(path, {"id": ["x"], "n": [1]})
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "foreign": b"id,n\nx,1\n"}[damage])
    ran = cli("load", str(path), *ROWS, *(["--json"] if as_json else []))
    assert ran.code == 1
    assert str(path) in (ran.json["message"] if as_json else ran.err)
    assert "Traceback" not in ran.err


def test_what_is_exported_loads_back(
    cli: Cli, client: Client, tmp_path: Path, operations_file: Callable[..., str]
) -> None:
    """The lines of an export are upserts of their records, from a file and from standard input; a delete is one word."""
    data = {"name": 'a "version"', "version": 7, "n": Decimal("1.5")}
    line = b'{"op":"insert","entity":"back","key":"k1","data":{"name":"a \\"version\\"","version":7,"n":1.5}}'
    assert cli("load", operations_file(line), "--request-id", "back/1").code == 0
    exported = str(tmp_path / "export.jsonl")
    assert cli("export", "--entity", "back", "--out", exported).code == 0
    assert cli("load", exported, "--op", "delete").code == 0
    assert cli("get", "back", "k1").code == 4
    ran = cli("load", "-", stdin=Path(exported).read_bytes())
    assert (ran.code, client.get("back", "k1").data) == (0, data), ran.out
    assert cli("verify", "back/1").code == 0


def test_plain_json_records_load(cli: Cli, client: Client, tmp_path: Path) -> None:
    """With `--entity` and `--key`, each JSON object is a record: from a file, gzipped, and from standard input."""
    line = '{"id":"plain-%s","n":12345678901234567890.5,"version":3,"key":"x"}\n'
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((line % "gz").encode()))
    assert cli("load", written(tmp_path / "rows.jsonl", "\ufeff" + line % "file"), *ROWS).code == 0
    assert cli("load", str(packed), *ROWS).code == 0
    assert cli("load", "-", *ROWS, stdin=(line % "stdin").encode()).code == 0
    expected = {"n": Decimal("12345678901234567890.5"), "version": 3, "key": "x"}
    assert [client.get("row", f"plain-{name}").data for name in ("file", "gz", "stdin")] == [expected] * 3
    ran = cli("load", str(packed), "--key", "id")
    assert (ran.code, "expected --entity and --key" in ran.err) == (1, True)


def cut_gzip(path: Path) -> str:
    path.write_bytes(gzip.compress(b'{"op":"delete","entity":"row","key":"x"}\n' * 10_000)[:-20])
    return str(path)


def damaged_gzip(path: Path) -> str:
    return written(path, b'{"op":"delete","entity":"row","key":"x"}\n')


def latin_1(path: Path) -> str:
    return written(path.with_suffix(".csv"), b"id,name\n1,Ren\xe9\n")


@pytest.mark.parametrize("broken", [cut_gzip, damaged_gzip, latin_1])
def test_all_files_are_read_before_the_first_is_sent(cli: Cli, client: Client, tmp_path: Path, broken: Any) -> None:
    """A damaged file beside a good one: the error names the damaged one, and nothing of the good one is applied."""
    key = f"good-{broken.__name__}"
    good = written(tmp_path / "good.jsonl", json.dumps({"id": key}) + "\n")
    bad = broken(tmp_path / "bad.jsonl.gz")
    ran = cli("load", good, bad, *ROWS)
    assert ran.code == 1
    assert bad in ran.err
    assert is_absent(client, key)


def test_standard_input_beside_a_file(cli: Cli, client: Client, tmp_path: Path) -> None:
    """Standard input is kept, so that it can be looked at before anything is sent; it cannot be given twice."""
    good = written(tmp_path / "good.jsonl", '{"id":"beside"}\n')
    assert cli("load", good, "-", *ROWS, stdin=b'\n{"id":"piped"}\n').code == 0
    assert [client.get("row", key).version for key in ("beside", "piped")] == [1, 1]
    ran = cli("load", "-", "-", *ROWS)
    assert (ran.code, "standard input only once" in ran.err) == (1, True)


def test_columns_become_fields_of_the_operation_only_when_asked(cli: Cli, client: Client, tmp_path: Path) -> None:
    """Columns `op` and `sequence` are data, and `load` says so; `--column` takes them, also under another name."""
    path = written(tmp_path / "rows.csv", "id,op,sequence,name\nc1,upsert,5,old\n")
    ran = cli("load", path, *ROWS)
    assert ran.code == 0
    assert "the column op is data; --column op takes it as a field" in ran.err
    assert "upsert replaces records whole: fields that a file lacks are removed (--op patch keeps them)" in ran.err
    assert client.get("row", "c1").data == {"op": "upsert", "sequence": "5", "name": "old"}
    path = written(tmp_path / "rows.csv", "id,op,at,name\nc2,,7,new\nc2,upsert,6,late\nc1,delete,,\nc3,upsert,soon,x\n")
    ran = cli("load", path, *ROWS, "--column", "op", "--column", "sequence=at")
    assert ran.code == 3
    assert "line 3: upsert row/c2: refused stale (the record has sequence 7)" in ran.out
    assert "line 5: upsert row/c3: refused invalid (sequence: Expected `int | null`, got `str`)" in ran.out
    record = client.get("row", "c2")
    assert (record.sequence, record.data) == (7, {"name": "new"})
    assert is_absent(client, "c1")
    for columns, expected in (
        (["sequence=nosuch"], "expected one of the columns"),
        (["version"], "expected one of op, sequence, expect_version, group"),
        (["op", "op=at"], "expected one column for op"),
        (["op=id"], "expected columns that are named once"),
    ):
        ran = cli("load", path, *ROWS, *(word for one in columns for word in ("--column", one)))
        assert (ran.code, expected in ran.err) == (1, True), ran.err
    assert "fields that the file lacks are removed" in " ".join(cli("load", "--help").out.split())


def test_a_refusal_names_the_line(cli: Cli, tmp_path: Path) -> None:
    """Blank lines and values of several lines count as the file's lines, as an editor shows them."""
    path = written(tmp_path / "rows.csv", 'id,name\n\n1,"two\nlines"\n2\n\n3,x,y\n')
    ran = cli("load", path, *ROWS)
    assert ran.code == 3
    assert "line 5: ? ?/?: refused invalid (line: row of 1 values for 2 columns)" in ran.out
    assert "line 7: ? ?/?: refused invalid (line: row of 3 values for 2 columns)" in ran.out


def test_a_bad_entity_is_one_error(cli: Cli, tmp_path: Path) -> None:
    """The name is checked once, before any row."""
    path = written(tmp_path / "rows.csv", "id,name\n" + "1,x\n" * 249)
    ran = cli("load", path, "--entity", "a b", "--key", "id")
    assert (ran.code, ran.err.count("--entity: expected")) == (1, 1)
