"""Exact values: conversion to DynamoDB JSON and back, sizes, and the canonical form of JSON."""

from __future__ import annotations

import re
from decimal import Decimal
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import (
    MAX_NESTING,
    Unstorable,
    from_attribute,
    from_item,
    stored_size,
    to_attribute,
    to_item,
)


def decimal_of(coefficient: int, exponent: int) -> Decimal:
    return Decimal((int(coefficient < 0), tuple(map(int, str(abs(coefficient)))), exponent))


whole = st.integers(-(10**38 - 1), 10**38 - 1)
fractions = st.builds(decimal_of, whole, st.integers(-130, 88))
values = st.recursive(
    st.none() | st.booleans() | whole | fractions | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal, where true is not 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


@settings(deadline=None, max_examples=300)
@given(values)
def test_values_survive_marshalling_exactly(value: Any) -> None:
    """A value that is marshalled, sent as JSON and read back is the same value."""
    sent = exactjson.loads(exactjson.dumps(to_attribute(value)))
    assert same(from_attribute(sent), value)


@settings(deadline=None, max_examples=100)
@given(whole | fractions)
def test_whole_numbers_are_read_as_int(value: int | Decimal) -> None:
    """Callers get `int` for whole numbers, however they were written, and `Decimal` for all others."""
    found = from_attribute(to_attribute(value))
    assert found == value
    assert type(found) is (int if value == int(value) else Decimal)


@settings(deadline=None, max_examples=300)
@given(st.floats())
def test_a_float_is_stored_as_the_decimal_of_its_shortest_text(value: float) -> None:
    """Any float is stored, or refused, exactly like the `Decimal` of its `repr`."""
    try:
        expected = to_attribute(Decimal(repr(value)))
    except Unstorable as error:
        with pytest.raises(Unstorable, match=re.escape(str(error))):
            to_attribute(value)
    else:
        assert to_attribute(value) == expected


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "attribute"),
    [
        ("", {"S": ""}),
        ("e\u0301", {"S": "e\u0301"}),
        (Colour.RED, {"S": "red"}),
        (0, {"N": "0"}),
        (-(10**37), {"N": "-1" + "0" * 37}),
        (Decimal("1.50"), {"N": "1.50"}),
        (True, {"BOOL": True}),
        (None, {"NULL": True}),
        (0.1, {"N": "0.1"}),
        (1e22, {"N": "1E+22"}),
        ((1, "a"), {"L": [{"N": "1"}, {"S": "a"}]}),
        ({"": {}}, {"M": {"": {"M": {}}}}),
    ],
)
def test_each_type_has_its_attribute_type(value: Any, attribute: dict[str, Any]) -> None:
    """DynamoDB JSON names the type of each value; true is not a number."""
    assert to_attribute(value) == attribute


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


UNSTORABLE: dict[str, tuple[Any, str, str]] = {
    "a set": ({"a": [{1}]}, ".a[0]", "set is not a JSON type"),
    "an object": (object(), "", "object is not a JSON type"),
    "bytes": ([b"x"], "[0]", "bytes is not a JSON type"),
    "39 digits": ({"a": {"b": 10**38 + 1}}, ".a.b", "39 significant digits, at most 38 can be stored exactly"),
    "NaN": ([0, float("nan")], "[1]", "NaN is not a JSON number"),
    "NaN with digits": ({"n": Decimal("NaN123")}, ".n", "NaN123 is not a JSON number"),
    "signalling NaN": (Decimal("-sNaN5"), "", "-sNaN5 is not a JSON number"),
    "1E+126": ([Decimal("1E+126")], "[0]", "magnitude 1E+126 is outside 1E-130 to 9.9E+125"),
    "half a pair": ({"a": "x\ud800"}, ".a", "not valid Unicode at character 1"),
    "half a pair as a name": ({"a": {"\ud800": 1}}, ".a", "not valid Unicode at character 0"),
    "a number as a name": ({"a": {1: 1}}, ".a", "name 1 is not text"),
    "too deep": ({"x": nested(MAX_NESTING)}, ".x" + ".a[0]" * 15, "nested deeper than 31 levels"),
}


@pytest.mark.parametrize(("value", "path", "why"), UNSTORABLE.values(), ids=UNSTORABLE.keys())
def test_values_that_dynamodb_cannot_store_are_refused(value: Any, path: str, why: str) -> None:
    """Nothing is rounded or changed to fit. Marshalling and measuring raise the same error, with the path of the value."""
    for walk in (to_attribute, stored_size):
        with pytest.raises(Unstorable) as caught:
            walk(value)
        assert (caught.value.path, caught.value.why) == (path, why)


def test_sets_can_be_read() -> None:
    """This package never writes sets, but it reads those that another program wrote."""
    assert from_attribute({"SS": ["a", "b"]}) == {"a", "b"}
    assert from_attribute({"NS": ["1", "2.5"]}) == {1, Decimal("2.5")}


def test_an_item_leaves_out_attributes_that_are_none() -> None:
    """None as an attribute of an item is left out; None inside the data is a null."""
    item = to_item({"pk": "a", "sequence": None, "data": {"x": None}})
    assert item == {"pk": {"S": "a"}, "data": {"M": {"x": {"NULL": True}}}}
    assert from_item(item) == {"pk": "a", "data": {"x": None}}


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("é😀", 6),
        (True, 1),
        (None, 1),
        ([], 3),
        ({}, 3),
        (["abc", True], 3 + (1 + 3) + (1 + 1)),
        ({"ab": "abc"}, 3 + 1 + 2 + 3),
        ({"a": {"é": ["x"]}}, 3 + (1 + 1 + 3) + (1 + 2 + 3) + (1 + 1)),
    ],
)
def test_sizes_are_counted_as_dynamodb_counts_them(value: Any, size: int) -> None:
    """Text counts its UTF-8 bytes, a list or map 3 bytes plus 1 an element, a boolean or null 1 byte."""
    assert stored_size(value) == size


@settings(deadline=None, max_examples=200)
@given(whole | fractions)
def test_the_size_of_a_number_is_never_underestimated(value: int | Decimal) -> None:
    """DynamoDB counts 1 byte for two significant digits, 1 for the exponent and 1 for a sign; no number counts over 21."""
    digits = "".join(map(str, Decimal(value).as_tuple().digits)).strip("0")
    real = (len(digits) + 1) // 2 + 1 + (value < 0)
    assert real <= stored_size(value) <= 21


@settings(deadline=None, max_examples=200)
@given(values)
def test_the_length_of_dynamodb_json_bounds_the_size(value: Any) -> None:
    """Marshalled text is longer than the JSON and than the size that DynamoDB counts, so its length is a sufficient check."""
    text = exactjson.dumps(to_attribute(value))
    assert len(text) >= stored_size(value)
    assert len(text) > len(exactjson.dumps(value))
    assert stored_size(value) <= 21 + 2 * len(exactjson.dumps(value))


@pytest.mark.parametrize(
    "texts",
    [
        ["1.5", "1.50", "15E-1", "0.15e1", "1.5000000000000000000000000000000000000"],
        ["2", "2.0", "2E0", "20e-1", "0.2E+1"],
        ["0", "-0", "0.0", "-0.00", "0E+5"],
        ["1E+40", "1" + "0" * 40, "10e39"],
        ['{"a":1,"b":[{"c":2,"d":3}]}', ' { "b" : [ { "d" : 3.0, "c" : 2 } ], "a" : 1e0 } '],
        ['"\\u00e9"', '"é"'],
        ["12345678901234567890123456789012345678", "12345678901234567890123456789012345678.0"],
    ],
)
def test_equal_values_have_one_canonical_form(texts: list[str]) -> None:
    """The notation of a number, the order of names and the escapes of text make no difference."""
    assert len({exactjson.canonical(exactjson.loads(text)) for text in texts}) == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("true", "1"),
        ("false", "0"),
        ("null", "false"),
        ("1", '"1"'),
        ("[]", "{}"),
        ("[1,2]", "[2,1]"),
        ("1.5", "1.50000000000000000000000000000000000001"),
        ("12345678901234567890123456789012345678", "12345678901234567890123456789012345679"),
        ('"é"', '"e\\u0301"'),
        ('{"a":null}', "{}"),
        ('""', "null"),
    ],
)
def test_different_values_have_different_canonical_forms(left: str, right: str) -> None:
    """Types, the order of lists, the last of 38 digits and the code points of text all count."""
    assert exactjson.canonical(exactjson.loads(left)) != exactjson.canonical(exactjson.loads(right))


def test_a_float_has_the_canonical_form_of_its_decimal() -> None:
    """A float equals the JSON number that is written like its `repr`."""
    assert exactjson.canonical({"a": 0.1}) == exactjson.canonical({"a": Decimal("0.10")})
    assert exactjson.canonical(2.0) == exactjson.canonical(2)


json_values = st.recursive(
    st.none() | st.booleans() | whole | fractions | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(json_values)
def test_the_canonical_form_is_json_of_the_same_value(value: Any) -> None:
    """The canonical form decodes to an equal value, and is its own canonical form."""
    text = exactjson.canonical(value)
    assert same(exactjson.loads(text), value)
    assert exactjson.canonical(exactjson.loads(text)) == text
