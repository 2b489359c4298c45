"""The table of operations is complete, and is the design's own."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mdstore.api.models import OperationModel
from mdstore.cli.load import load
from mdstore.model import OpName
from mdstore.store.operations import OPERATIONS, WRITING_OPS, effect_on


def test_every_name_has_its_row() -> None:
    """A name that messages accept has a row, and no row lacks a name."""
    assert tuple(OPERATIONS) == get_args(OpName)


def test_the_table_says_what_the_design_says() -> None:
    """What an operation needs the record to be, whether it has data, whether it may create a record, and its effect."""
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
    ("op", "made"),
    [("insert", {"b": 2}), ("update", {"b": 2}), ("upsert", {"b": 2}), ("patch", {"a": 1, "b": 2}), ("delete", None),
     ("check", {"a": 1})],
)  # fmt: skip
def test_effects(op: OpName, made: Any) -> None:
    """Each operation's effect on data that is there."""
    assert effect_on({"a": 1}, op, {"b": 2}) == made


def test_the_command_line_and_the_api_offer_the_tables_names() -> None:
    """Whoever adds a row sees it offered everywhere."""
    (option,) = [one for one in load.params if one.name == "op"]
    assert tuple(option.type.choices) == WRITING_OPS == ("insert", "update", "patch", "upsert", "delete")  # type: ignore[attr-defined]
    assert tuple(OperationModel.model_json_schema()["properties"]["op"]["enum"]) == tuple(OPERATIONS)
