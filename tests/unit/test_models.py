"""What a bound model makes of data is what is stored, and all problems of an operation are reported."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator

from mdstore.store.entities import Entities
from mdstore.store.validation import FieldError, Validator


class Colour(Enum):
    RED = "red"


class Part(BaseModel):
    count: int


class Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int


class Tags(RootModel[list[Decimal]]):
    pass


class Product(BaseModel):
    price: Decimal = Decimal(0)
    weight: float = 0.0
    stock: int = Field(default=0, alias="Stock")
    name: str = Field(default="", validation_alias=AliasChoices("name", "title"))
    made: date | None = None
    seen: datetime | None = None
    colour: Colour | None = None
    id: UUID | None = None
    parts: list[Part] = []
    by_name: dict[str, Part] = {}
    tags: set[str] = set()
    numbers: Tags | None = None
    sealed: Sealed | None = None
    upper: str = ""

    @field_validator("upper")
    @classmethod
    def _upper(cls, value: str) -> str:
        return value.upper()


class Whole(BaseModel):
    model_config = ConfigDict(extra="allow")
    width: int
    area: int = 0

    @model_validator(mode="after")
    def _area(self) -> Whole:
        self.area = self.width * self.width
        return self


validator = Validator(entities=Entities({"product": Product, "whole": Whole}), max_record_bytes=2**20)


def stored(entity: str, data: dict[str, Any]) -> Any:
    """The data that is stored."""
    return validator.read({"op": "insert", "entity": entity, "key": "k", "data": data})[0].data


def problems(operation: Any) -> list[tuple[str, str]]:
    """All problems of an operation."""
    with pytest.raises(FieldError) as caught:
        validator.read(operation)
    error = caught.value
    return [(error.field, error.why), *error.others]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"price": "1.50"}, {"price": Decimal("1.50")}),
        ({"price": Decimal("12345678901234567890.123456789")}, {"price": Decimal("12345678901234567890.123456789")}),
        ({"weight": "1.5"}, {"weight": 1.5}),
        ({"Stock": "7"}, {"Stock": 7}),
        ({"stock": "7"}, {"stock": "7"}),
        ({"title": "x"}, {"name": "x"}),
        ({"made": "2026-01-31", "seen": 0}, {"made": "2026-01-31", "seen": "1970-01-01T00:00:00Z"}),
        ({"made": date(2026, 1, 31)}, {"made": "2026-01-31"}),
        ({"colour": "red", "id": "0" * 31 + "1"}, {"colour": "red", "id": "00000000-0000-0000-0000-000000000001"}),
        (
            {"parts": [{"count": "1", "unknown": Decimal("2.5")}], "unknown": [Decimal("1.5")]},
            {"parts": [{"count": 1, "unknown": Decimal("2.5")}], "unknown": [Decimal("1.5")]},
        ),
        ({"by_name": {"a": {"count": "1", "b": "c"}}}, {"by_name": {"a": {"count": 1, "b": "c"}}}),
        ({"tags": ["c", "a", "b"]}, {"tags": ["a", "b", "c"]}),
        ({"numbers": ["1.5", 2]}, {"numbers": [Decimal("1.5"), Decimal(2)]}),
        ({"upper": "x"}, {"upper": "X"}),
        ({"weight": 1, "b": 1, "price": 2, "a": 1}, {"weight": 1.0, "b": 1, "price": Decimal(2), "a": 1}),
        ({}, {}),
    ],
)
def test_the_model_s_json_form_is_stored(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Values take the model's types in JSON; decimals stay exact, unknown fields stay, defaults are not filled in."""
    found = stored("product", given)
    assert (found, repr(found)) == (expected, repr(expected))


def test_a_model_that_allows_more() -> None:
    """Extra values stay exact, and a field that a validator sets is stored."""
    assert stored("whole", {"width": "3", "more": Decimal("0.1")}) == {"width": 3, "area": 9, "more": Decimal("0.1")}


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity"])
def test_a_number_that_json_lacks_is_refused(text: str) -> None:
    """A float that the model takes from text must be a number; it is not stored as null."""
    for field in ("weight", "price"):
        found = problems({"op": "insert", "entity": "product", "key": "k", "data": {field: text}})
        assert found[0][0] == f"data.{field}"


def test_all_flaws_are_reported() -> None:
    """Problems of the fields and of the model's fields come together, in a line and in a mapping."""
    found = problems(
        {
            "op": "insert", "entity": "product", "key": "", "expect_version": 0, "group": "",
            "data": {"price": "x", "Stock": "y", "sealed": {"size": 1, "more": 2}},
        }
    )  # fmt: skip
    assert [field for field, _ in found] == [
        "key", "expect_version", "group", "data.price", "data.Stock", "data.sealed.more"
    ]  # fmt: skip


def test_all_wrong_types_are_reported() -> None:
    """Msgspec names the first wrong type; the others follow, with missing and unknown fields."""
    expected = {"op", "entity", "data", "sequence", "colour"}
    operation = {"op": "drop", "key": "k", "data": [], "sequence": "1", "colour": "red"}
    assert {field for field, _ in problems(operation)} == expected
    line = b'{"op":"drop","key":"k","data":[],"sequence":"1","colour":"red"}'
    assert {field for field, _ in problems(line)} == expected


def test_all_values_that_cannot_be_stored_are_reported() -> None:
    """Every value that DynamoDB cannot hold is named, up to twenty of them."""
    data = {"a": [0, 10**38 + 1], "b": {"c": float("nan"), "d": 1}, "e": {"f": b"x"}}
    found = problems({"op": "insert", "entity": "other", "key": "k", "data": data})
    assert [field for field, _ in found] == ["data.a[1]", "data.b.c", "data.e.f"]
    many = {"op": "insert", "entity": "other", "key": "k", "data": {"a": [b"x"] * 1_000}}
    assert len(problems(many)) == 20
