"""The table of operations is complete, and agrees with the design."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mdstore.api.models import OperationModel
from mdstore.cli.requests import load
from mdstore.model import OpName
from mdstore.store.operations import OPERATIONS, WRITING_OPS, effect_on


def test_every_operation_name_has_a_row() -> None:
    """Each name that messages accept has a row, and each row has such a name."""
    assert tuple(OPERATIONS) == get_args(OpName)


def test_the_table_agrees_with_the_design() -> None:
    """Each row says what the record must be, whether data is needed, whether a record may be created, and the effect."""
    rows = {op: (spec.needs, spec.needs_data, spec.may_create, spec.effect) for op, spec in OPERATIONS.items()}
    assert rows == {
        "insert": ("absent", True, True, "set"),
        "update": ("present", True, False, "set"),
        "patch": ("present", True, False, "merge"),
        "upsert": ("either", True, True, "set"),
        "delete": ("present", False, False, "remove"),
        "check": ("present", False, False, "none"),
    }


@pytest.mark.parametrize(
    ("op", "expected"),
    [("insert", {"b": 2}), ("update", {"b": 2}), ("upsert", {"b": 2}), ("patch", {"a": 1, "b": 2}), ("delete", None),
     ("check", {"a": 1})],
)  # fmt: skip
def test_the_effect_of_each_operation_on_existing_data(op: OpName, expected: Any) -> None:
    """Each effect is applied to `{"a": 1}`, with `{"b": 2}` as the operation's data."""
    assert effect_on({"a": 1}, op, {"b": 2}) == expected


def test_the_command_line_and_the_http_api_offer_the_names_of_the_table() -> None:
    """A row that is added to the table is offered everywhere."""
    (option,) = [one for one in load.params if one.name == "op"]
    assert tuple(option.type.choices) == WRITING_OPS == ("insert", "update", "patch", "upsert", "delete")  # type: ignore[attr-defined]
    assert tuple(OperationModel.model_json_schema()["properties"]["op"]["enum"]) == tuple(OPERATIONS)
