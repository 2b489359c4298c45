"""The main job end to end: real input through the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.acceptance import airports
from tests.acceptance.conftest import Cli


def test_real_airports_end_in_the_published_state(cli: Cli, tmp_path: Path) -> None:
    """28,426 inserts and 722 changes give 28,298 records with the published SHA-256, and both requests verify."""
    file = airports.write(tmp_path / "airports.jsonl", airports.inserts())

    loaded = cli("load", file, "--request-id", "main/load", "--json")
    changed = cli("load", str(airports.CHANGES), "--request-id", "main/changes", "--json")

    assert (loaded.code, loaded.json["applied_by_op"]) == (0, {"insert": 28_426}), loaded.err
    assert (changed.code, changed.json["applied_by_op"]) == (0, {"delete": 294, "insert": 166, "update": 262})
    export = cli("export", "--entity", "airport")
    records = [json.loads(line) for line in export.out.strip().split("\n")]
    assert len(records) == airports.AFTER_CHANGES
    assert airports.digest({record["key"]: record["data"] for record in records}) == airports.FINAL_SHA256
    assert cli("verify", "main/load").code == 0
    assert cli("verify", "main/changes", "--json").json == {
        "request_id": "main/changes", "ok": True, "operations": 722, "applied": 722, "refused": 0,
        "superseded": 0, "fault_count": 0, "faults": [], "same_models": True,
    }  # fmt: skip

    again = cli("load", file, "--request-id", "main/load")
    assert again.code == 0
    assert "accepted before with the same content: nothing was sent" in again.out

    other = cli("load", str(airports.CHANGES), "--request-id", "main/load")
    assert other.code == 1
    assert "request 'main/load' was accepted before with other content" in other.err

    renamed = cli("load", file, "--request-id", "main/load-again", "--json")
    # Of the 28,426 inserts the 294 whose records were deleted apply again; the other records exist.
    assert renamed.code == 3
    assert renamed.json["refused_by_reason"] == {"exists": 28_132}
    assert renamed.json["applied_by_op"] == {"insert": 294}


def test_each_insert_of_a_loaded_file_is_refused_under_another_id(cli: Cli, tmp_path: Path) -> None:
    """Loading a file again under another request id refuses each insert with `exists`, and exits with 3."""
    operations = [{"op": "insert", "entity": "again", "key": str(n), "data": {"n": n}} for n in range(250)]
    file = airports.write(tmp_path / "again.jsonl", operations)

    first, second = cli("load", file, "--json"), cli("load", file, "--json")

    assert (first.code, first.json["applied"]) == (0, 250)
    assert (second.code, second.json["applied"]) == (3, 0)
    assert second.json["refused_by_reason"] == {"exists": 250}
    assert cli("get", "again", "7", "--json").json["version"] == 1


def test_a_missing_record_or_request_has_its_own_exit_code(cli: Cli) -> None:
    """For a record or request that does not exist the exit code is 4, and the message names it."""
    record, request = cli("get", "again", "nothing"), cli("status", "nothing")

    assert (record.code, request.code) == (4, 4)
    assert "no record 'again/nothing'" in record.err
    assert "no request 'nothing'" in request.err


def test_status_lists_outcomes(cli: Cli, tmp_path: Path) -> None:
    """`status --outcomes refused` lists each refused operation with its reason and the version that it met."""
    operation = {"op": "insert", "entity": "twice", "key": "k", "data": {}}
    file = airports.write(tmp_path / "twice.jsonl", [operation, operation])
    cli("load", file, "--request-id", "outcomes/1")

    found = cli("status", "outcomes/1", "--outcomes", "refused", "--json").json

    assert found["outcomes"] == [
        {"index": 1, "outcome": "refused", "op": "insert", "entity": "twice", "key": "k", "reason": "exists",
         "detail": "the record has version 1"},
    ]  # fmt: skip
