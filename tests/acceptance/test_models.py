"""Entities bound to a model: a record holds what the model makes of the data, whichever way the data came in."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from mdstore.client import Client
from tests.acceptance.conftest import Cli

AIRPORTS = ("--entity", "airport", "--key", "icao_code")


def airports(path: Path, rows: str) -> str:
    """Write a CSV file of airports, and return its path."""
    path.write_text(f"icao_code,lat,country,note\n{rows}", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("way", ["csv", "lines", "library", "task", "patch"])
def test_the_text_of_a_number_is_stored_as_a_number(
    cli: Cli, client: Client, tmp_path: Path, operations_file: Callable[..., str], way: str
) -> None:
    """The model says float, so text becomes a number; a field that the model does not know stays text. It all verifies."""
    key = f"MODEL-{way}"
    operation: dict[str, Any] = {"op": "upsert", "entity": "airport", "key": key}
    operation["data"] = {"lat": "40.639751", "country": "US", "note": "5"}
    request = f"model/{way}"
    if way == "csv":
        path = airports(tmp_path / "airports.csv", f"{key},40.639751,US,5\n")
        assert cli("load", path, *AIRPORTS, "--request-id", request).code == 0
    elif way == "lines":
        assert cli("load", operations_file(operation), "--request-id", request).code == 0
    elif way == "library":
        client.submit([operation], request_id=request).wait()
    elif way == "task":
        assert client.ingest.delay([operation], request_id=request).get(timeout=60)["applied"] == 1
    else:
        first = {**operation, "op": "insert", "data": {"note": "5"}}
        patch = {**operation, "op": "patch", "data": {"lat": "40.639751", "country": "US"}}
        client.submit([first, patch], request_id=request).wait()

    assert client.get("airport", key).data == {"lat": Decimal("40.639751"), "country": "US", "note": "5"}
    ran = cli("verify", request)
    assert ran.code == 0, ran.out


def test_all_flaws_of_a_row_are_reported(cli: Cli, tmp_path: Path) -> None:
    """A row that breaks two rules of its model names both of them, with the line."""
    ran = cli("load", airports(tmp_path / "airports.csv", "A1,north,usa,x\n"), *AIRPORTS)
    assert ran.code == 3
    assert (
        "line 2: upsert airport/A1: refused invalid (data.country: String should match pattern '^([A-Z]{2})?$';"
        " data.lat: Input should be a valid number, unable to parse string as a number)"
    ) in ran.out


def test_load_says_which_models_it_checks_against(cli: Cli, tmp_path: Path) -> None:
    """The names of the entities with a model are printed, and part of `--json`."""
    path = airports(tmp_path / "airports.csv", "A2,1,US,x\n")
    assert "data is checked against the models of: airport" in cli("load", path, *AIRPORTS).err
    assert cli("load", path, *AIRPORTS, "--json").json["models"] == ["airport"]
