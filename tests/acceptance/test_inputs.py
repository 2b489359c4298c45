"""Odd, wrong and large inputs have exactly the outcome that is documented."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from mdstore.client import Client
from tests.acceptance.conftest import Cli

File = Callable[..., str]


def insert(key: str, data: Any, **more: Any) -> dict[str, Any]:
    """Return an insert of the entity `odd`."""
    return {"op": "insert", "entity": "odd", "key": key, "data": data, **more}


def refusals(client: Client, request_id: str) -> list[tuple[int, str, str]]:
    """Return `(index, reason, detail)` of each refused operation."""
    return [(one.index, one.reason, one.detail) for one in client.outcomes(request_id, only="refused")]


@pytest.mark.parametrize(
    ("name", "line", "detail"),
    [
        (
            "malformed",
            b'{"op":"insert",',
            "line: not a JSON object of an operation: column 16: the text ends too early",
        ),
        ("list", b"[1]", "operation: Expected `object`, got `array`"),
        ("op", b'{"op":"replace","entity":"odd","key":"k","data":{}}', "op: Invalid enum value 'replace'"),
        ("no-key", b'{"op":"insert","entity":"odd","data":{}}', "key: Object missing required field `key`"),
        ("no-data", b'{"op":"insert","entity":"odd","key":"k"}', "data: insert needs a JSON object"),
        ("field", b'{"op":"delete","entity":"odd","key":"k","dat":{}}', "dat: Object contains unknown field `dat`"),
    ],
)
def test_an_invalid_line_is_refused_and_the_others_apply(
    cli: Cli, client: Client, operations_file: File, name: str, line: bytes, detail: str
) -> None:
    """A line that is not an operation is refused as `invalid` with the reason, its neighbours apply, and the exit code is 3."""
    path = operations_file(insert(f"{name}-before", {}), line, insert(f"{name}-after", {}))

    ran = cli("load", path, "--request-id", f"invalid/{name}", "--json")

    assert (ran.code, ran.json["applied"], ran.json["refused_by_reason"]) == (3, 2, {"invalid": 1})
    assert refusals(client, f"invalid/{name}") == [(1, "invalid", detail)]
    assert client.get("odd", f"{name}-before").version == client.get("odd", f"{name}-after").version == 1
    assert cli("verify", f"invalid/{name}").code == 0


def test_records_over_the_item_limit_come_back_whole(cli: Cli, client: Client, operations_file: File) -> None:
    """Records of 500 KB and 5 MB are applied, read back whole and patched; one shrinks until its item holds its data again."""
    texts = {"half": "é" * 250_000, "five": "x\u0007y" * 1_750_000}
    path = operations_file(*(insert(key, {"text": text, "n": 1}) for key, text in texts.items()))

    ran = cli("load", path, "--request-id", "large/1", "--json")

    assert (ran.code, ran.json["applied"]) == (0, 2), ran.out
    for key, text in texts.items():
        assert client.get("odd", key).data == {"text": text, "n": 1}
    assert cli("verify", "large/1").code == 0
    patch = {"op": "patch", "entity": "odd", "data": {"n": 2}}
    shrink = {"op": "patch", "entity": "odd", "key": "half", "data": {"text": None}}
    path = operations_file({**patch, "key": "five"}, {**patch, "key": "half"}, shrink)
    assert cli("load", path, "--request-id", "large/2").code == 0
    assert client.get("odd", "five").data == {"text": texts["five"], "n": 2}
    assert client.get("odd", "half").data == {"n": 2}
    assert cli("verify", "large/2").code == 0


def test_a_record_over_the_settings_limit_is_refused(cli: Cli, client: Client, operations_file: File) -> None:
    """A record over `max_record_bytes` (16 MB) is refused as `too_large`, with its size, and its neighbour applies."""
    huge = insert("huge", {"text": "x" * 17_000_000})
    path = operations_file(huge, insert("beside-huge", {}))

    assert cli("load", path, "--request-id", "large/3").code == 3
    assert refusals(client, "large/3") == [
        (0, "too_large", f"data: {len(json.dumps(huge))} bytes as JSON, at most 16777216 are allowed")
    ]
    assert client.get("odd", "beside-huge").version == 1


def test_three_hundred_operations_on_one_key_apply_in_order(cli: Cli, client: Client, operations_file: File) -> None:
    """300 operations on one key all apply in the order given: the version is 300 and the data is that of the last one."""
    upserts = ({"op": "upsert", "entity": "odd", "key": "hot", "data": {"n": n}} for n in range(300))

    ran = cli("load", operations_file(*upserts), "--request-id", "hot/1", "--json")

    assert (ran.code, ran.json["applied_by_op"]) == (0, {"upsert": 300})
    record = client.get("odd", "hot")
    assert (record.version, record.data) == (300, {"n": 299})
    assert cli("verify", "hot/1").code == 0


def test_a_group_of_99_applies_and_a_group_of_100_is_refused(cli: Cli, client: Client, operations_file: File) -> None:
    """A group of 99 applies in one transaction; each operation of a group of 100 is refused, and the detail names the limit."""
    fits = [insert(f"fits-{n}", {}, group="fits") for n in range(99)]
    over = [insert(f"over-{n}", {}, group="over") for n in range(100)]

    ran = cli("load", operations_file(*fits, *over), "--request-id", "groups/1", "--json")

    assert (ran.code, ran.json["applied"], ran.json["refused_by_reason"]) == (3, 99, {"invalid": 100})
    detail = "group: more than 99 operations cannot apply atomically"
    assert refusals(client, "groups/1") == [(index, "invalid", detail) for index in range(99, 199)]
    writers = {client.get("odd", f"fits-{n}").updated_by for n in range(99)}
    assert len(writers) == 1
    assert cli("verify", "groups/1").code == 0


def test_a_group_applies_as_a_whole_or_not_at_all(cli: Cli, client: Client, operations_file: File) -> None:
    """One refusal in a group refuses the whole group: the others have the reason `group_refused`."""
    path = operations_file(
        insert("whole-1", {"n": 1}),
        insert("whole-2", {"n": 2}, group="g"),
        {"op": "check", "entity": "odd", "key": "whole-1", "expect_version": 7, "group": "g"},
        {"op": "update", "entity": "odd", "key": "whole-none", "data": {}, "group": "h"},
        insert("whole-3", {}, group="h"),
        {"op": "check", "entity": "odd", "key": "whole-1", "expect_version": 1, "group": "i"},
        insert("whole-4", {}, group="i"),
    )

    cli("load", path, "--request-id", "groups/2")

    assert sorted(refusals(client, "groups/2")) == [
        (1, "group_refused", "another operation of the group was refused"),
        (2, "version_mismatch", "the record has version 1"),
        (3, "missing", "there is no record"),
        (4, "group_refused", "another operation of the group was refused"),
    ]
    assert [client.get("odd", key).version for key in ("whole-1", "whole-4")] == [1, 1]
    assert cli("verify", "groups/2").code == 0


EXACT: dict[str, Any] = {
    "int19": 9_223_372_036_854_775_807,
    "int38": -12_345_678_901_234_567_890_123_456_789_012_345_678,
    "decimal38": Decimal("0.12345678901234567890123456789012345678"),
    "decimal38e": Decimal("1.2345678901234567890123456789012345678E-100"),
    "emoji": "👩‍👩‍👧‍👦 🇩🇪",
    "control": "".join(map(chr, range(1, 32))) + "\x7f\u2028",
    "empty": "",
    "decomposed": "e\u0301 \u1e9b\u0323 \u212b",
    "nested": {" ": [], "a": {}, "b": [None, True, False, {"c": [[[]]]}]},
}


def test_data_comes_back_exactly(cli: Cli, client: Client, operations_file: File) -> None:
    """19-digit integers, 38-digit decimals, emoji, control characters, empty strings and non-NFC text come back unchanged."""
    numbers = {name: f'"{name}":{value}' for name, value in EXACT.items() if isinstance(value, int | Decimal)}
    others = json.dumps({name: value for name, value in EXACT.items() if name not in numbers}, ensure_ascii=False)
    data = "{" + ",".join(numbers.values()) + "," + others[1:]
    line = f'{{"op":"insert","entity":"odd","key":"Ключ e\u0301 🗝","data":{data}}}'.encode()

    assert cli("load", operations_file(line), "--request-id", "exact/1").code == 0

    assert client.get("odd", "Ключ e\u0301 🗝").data == EXACT
    exported = next(text for text in cli("export", "--entity", "odd").out.split("\n") if "Ключ" in text)
    assert all(number in exported for number in numbers.values())
    assert json.loads(exported)["data"]["control"] == EXACT["control"]
    assert cli("verify", "exact/1").code == 0


def test_sequences_keep_late_operations_out(cli: Cli, client: Client, operations_file: File) -> None:
    """An operation whose sequence is not newer than the record's is `stale`, also after a delete; versions keep counting."""

    def change(op: str, sequence: int, **more: Any) -> dict[str, Any]:
        return {"op": op, "entity": "odd", "key": "sequenced", "sequence": sequence, **more}

    path = operations_file(
        change("insert", 10, data={"n": 10}),
        change("update", 9, data={"n": 9}),
        change("upsert", 10, data={"n": 10}),
        change("delete", 12),
        change("upsert", 11, data={"n": 11}),
        change("insert", 13, data={"n": 13}),
    )

    cli("load", path, "--request-id", "sequence/1")

    assert refusals(client, "sequence/1") == [
        (1, "stale", "the record has sequence 10"),
        (2, "stale", "the record has sequence 10"),
        (4, "stale", "the record has sequence 12"),
    ]
    record = client.get("odd", "sequenced")
    assert (record.version, record.sequence, record.data) == (3, 13, {"n": 13})
    assert cli("verify", "sequence/1").code == 0


def test_rows_of_a_table_become_operations(cli: Cli, client: Client, tmp_path: Any) -> None:
    """A CSV file loads with `--entity` and `--key`; without them, or with a wrong column, the error says what is expected."""
    path = tmp_path / "rows.csv"
    path.write_text("code,name\nDE,Deutschland\nFR,\n", encoding="utf-8")

    assert cli("load", str(path), "--entity", "country", "--key", "code", "--op", "insert").code == 0
    assert client.get("country", "DE").data == {"name": "Deutschland"}
    assert client.get("country", "FR").data == {"name": ""}
    ran = cli("load", str(path))
    assert (ran.code, "expected --entity and --key for a CSV or Parquet file" in ran.err) == (1, True)
    ran = cli("load", str(path), "--entity", "country", "--key", "iso")
    assert (ran.code, "expected one of the columns code, name" in ran.err) == (1, True)
    path.write_text("code,name\nIT,Italia,Roma\nES\nPT,Portugal\n", encoding="utf-8")
    assert cli("load", str(path), "--entity", "country", "--key", "code", "--request-id", "rows/1").code == 3
    assert [one[0] for one in refusals(client, "rows/1")] == [0, 1]
    assert "row of 3 values for 2 columns" in refusals(client, "rows/1")[0][2]


def test_standard_input_and_gzip_are_read(cli: Cli, client: Client, tmp_path: Any) -> None:
    """`load -` reads JSON Lines from standard input, and `load` decompresses a `.jsonl.gz` file."""
    import gzip  # noqa: PLC0415

    line = json.dumps(insert("stdin", {})).encode()
    packed = tmp_path / "operations.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(insert("gzip", {})).encode()))

    assert cli("load", "-", stdin=line).code == 0
    assert cli("load", str(packed)).code == 0
    assert [client.get("odd", key).version for key in ("stdin", "gzip")] == [1, 1]
