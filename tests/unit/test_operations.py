"""The table of operations is complete, and agrees with the design."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mdstore.api import models
from mdstore.cli.load import load
from mdstore.model import OpName
from mdstore.store.operations import OPERATIONS, WRITING_OPS, effect_on


def test_every_operation_name_has_a_row() -> None:
    """Each name that messages accept has a row, and each row has such a name."""
    assert tuple(OPERATIONS) == get_args(OpName)


def test_the_table_agrees_with_the_design() -> None:
    """Each row says what the record must be, also for an operation with a sequence, whether data is needed, and the effect."""
    rows = {
        op: (spec.needs, spec.needs_of(has_sequence=True), spec.needs_data, spec.effect)
        for op, spec in OPERATIONS.items()
    }
    assert rows == {
        "insert": ("absent", "absent", True, "set"),
        "update": ("present", "present", True, "set"),
        "patch": ("present", "present", True, "merge"),
        "upsert": ("either", "either", True, "set"),
        "delete": ("present", "either", False, "remove"),
        "check": ("present", "present", False, "none"),
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
    kinds = models.schemas()["Operation"]["oneOf"]
    assert tuple(kind["properties"]["op"]["const"] for kind in kinds) == tuple(OPERATIONS)
