"""Numbers, text and nested data come back exactly, or are refused; nothing is rounded.

Source: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html
"""

from __future__ import annotations

import unicodedata
from decimal import Decimal
from typing import Any

import pytest

from mdstore.aws.dynamodb.attributes import to_attribute
from mdstore.errors import RequestRejected
from mdstore.model import OpName
from tests.conformance.bench import Bench

NUMBERS = (
    "0", "1", "-1", "0.1", "-0.1", "123.456", "1E+2", "9007199254740993", "18446744073709551617",
    "12345678901234567890123456789012345678", "-99999999999999999999999999999999999999",
    "1234567890123456789.0123456789012345678", "0.00012345678901234567890123456789012345678",
    "0.1234567890123456789012345678901234567", "1E-130", "-1E-130", "1E+125", "-1E+125",
    "9.9999999999999999999999999999999999999E+125", "-9.9999999999999999999999999999999999999E+125",
    "1.2345678901234567890123456789012345678E-93",
)  # fmt: skip
TOO_MANY_DIGITS = (
    "123456789012345678901234567890123456789", "-123456789012345678901234567890123456789",
    "0.123456789012345678901234567890123456789", "1234567890123456789012345678901234567.89",
    "9.99999999999999999999999999999999999999E+125",
)  # fmt: skip
TOO_LARGE = ("1E+126", "-1E+126")
TOO_SMALL = ("1E-131", "-1E-131")
NOT_NUMBERS = ("NaN", "Infinity", "abc", "", "1 2", "0x10")
TEXTS = {
    "empty": "",
    "space": " ",
    "composed": "é",
    "decomposed": unicodedata.normalize("NFD", "é"),
    "compatibility": "\ufb01\u2126\u212b",  # letters that normalising would replace
    "combining": "a\u0301\u0323 a\u0323\u0301",
    "astral": "🛫👩🏽‍🚀𝔘",
    "non-characters": "\ufffe\uffff\U0010ffff",
    "control": "\x00\x01\t\n\r\x1f\x7f\x85",
    "separators": "\u2028\u2029\u00a0\ufeff",
    "directions": "\u202eabc\u202c עברית",
    "json": '"\\/\b{}[]:,\\u0041',
    "long": "東京🛫é" * 5_000,
}


def write_and_read(bench: Bench, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Write data with a Put and with an Update; returns what is read back of each."""
    attribute = to_attribute(data)
    bench.send(bench.act("insert", "put", data=attribute), bench.act("upsert", "updated", data=attribute))
    return [(bench.values(key) or {})["data"] for key in ("put", "updated")]


@pytest.mark.double
@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_comes_back_exactly(bench: Bench, text: str) -> None:
    """A number of up to 38 significant digits, between 1E-130 and 9.9...E+125 in magnitude, comes back exactly."""
    number = Decimal(text)
    data = {"n": number, "list": [number]}
    assert write_and_read(bench, data) == [data] * 2


OPS: tuple[OpName, ...] = ("insert", "upsert")  # a Put and an Update


def refused(bench: Bench, text: str) -> None:
    """Check that a Put and an Update with this number make the whole call malformed."""
    for op in OPS:
        with pytest.raises(RequestRejected) as caught:
            bench.send(bench.act("insert", "a"), bench.act(op, "k", data={"M": {"n": {"L": [{"N": text}]}}}))
        assert caught.value.code == "ValidationException"
        assert (bench.item("a"), bench.item("k")) == (None, None)


@pytest.mark.parametrize("text", TOO_MANY_DIGITS)
def test_a_39th_digit_is_refused(bench: Bench, text: str) -> None:
    """A number of 39 digits is refused, not rounded."""
    refused(bench, text)


@pytest.mark.parametrize("text", [*TOO_LARGE, *TOO_SMALL])
def test_a_magnitude_out_of_range_is_refused(bench: Bench, text: str) -> None:
    """A number that is too large does not become infinity, and one that is too small does not become zero."""
    refused(bench, text)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_text_that_is_not_a_number_is_refused(bench: Bench, text: str) -> None:
    """A number consists of digits, a sign, a point and an exponent; other text is refused."""
    refused(bench, text)


@pytest.mark.double
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_comes_back_as_given(bench: Bench, name: str) -> None:
    """Text as a value, in a list and as a name comes back with the same code points, without normalising."""
    text = TEXTS[name]
    data = {"text": text, "list": [text], "map": {f"x{text}": text}}
    assert write_and_read(bench, data) == [data] * 2


@pytest.mark.double
@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if len(text) < 100])
def test_a_key_may_be_any_text(bench: Bench, name: str) -> None:
    """A record is found by exactly the key that was given."""
    key = f"x{TEXTS[name]}"
    bench.send(bench.act("insert", key))
    found = bench.values(key)
    assert found is not None
    assert (found["key"], found["data"]) == (key, {"n": 2})
    assert bench.records.get(bench.entity, key).key == key


@pytest.mark.double
def test_keys_that_look_alike_are_different(bench: Bench) -> None:
    """Keys that differ only in composition, case or a trailing space name different records."""
    keys = ["é", unicodedata.normalize("NFD", "é"), "É", "é ", "e", "\u212b", "\u00c5"]
    bench.send(*(bench.act("insert", key, data=to_attribute({"n": n})) for n, key in enumerate(keys)))
    records = bench.records.look_up((bench.entity, key) for key in keys)
    assert [records[bench.entity, key].data for key in keys] == [{"n": n} for n in range(len(keys))]


SHAPES: tuple[Any, ...] = (
    {},
    {"a": {}},
    {"a": []},
    {"a": [[], {}, [{}]]},
    {"a": None},
    {"a": None, "b": True, "c": False, "d": 0, "e": 1, "f": "", "g": "0", "h": Decimal("0.5")},
    {" ": 1, "a.b": 2, "a[0]": 3, "#a": 4, ":a": 5, "state": 6, "ä": 7},
    {"list": list(range(500))},
    {f"name{n}": n for n in range(500)},
)


@pytest.mark.double
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_shape_comes_back_as_given(bench: Bench, number: int) -> None:
    """Empty maps and lists, null, booleans beside numbers, and names with a meaning in expressions come back unchanged."""
    for found in write_and_read(bench, SHAPES[number]):
        assert found == SHAPES[number]
        assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in SHAPES[number].items()}
