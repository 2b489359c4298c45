"""What DynamoDB counts and takes: sizes of numbers, zeros of any exponent, names, and nesting."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import MAX_NAME, MAX_NESTING, Unstorable, stored_size, to_attribute
from mdstore.store.entities import Entities
from mdstore.store.validation import FieldError, Validator

NINES = "9" * 38


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 2),
        ("12", 2),
        ("123", 3),
        ("-123", 4),
        ("1.5", 3),
        ("12.34", 3),
        ("123.456", 5),
        ("-123.456", 6),
        ("1500", 2),  # 15 is a pair; the zeros are trimmed
        ("15000", 3),  # 1 and 50, as pairs count from the decimal point
        ("0.15", 2),
        ("0.015", 3),  # 01 and 50
        ("0.000001", 2),
        ("1E+125", 2),
        ("-1E-130", 3),
        ("1.50000", 3),
        (NINES, 20),
        ("-" + NINES, 21),
        (f"{NINES[:37]}.{NINES[:1]}", 21),
        (f"-{NINES[:37]}.{NINES[:1]}", 22),
        (f"-{NINES[:1]}.{NINES[:37]}", 22),
        (f"-0.0{NINES}", 22),
    ],
)
def test_a_number_is_counted_by_its_pairs_of_digits(text: str, size: int) -> None:
    """One byte for the exponent, one for each pair of digits on either side of the point, and one for a minus."""
    assert stored_size(Decimal(text)) == size


@settings(deadline=None, max_examples=300)
@given(st.integers(-(10**38) + 1, 10**38 - 1), st.integers(-130, 80))
def test_a_number_is_counted_as_its_plain_digits_are(coefficient: int, exponent: int) -> None:
    """The size is that of the number written out, without the zeros at both ends, in pairs from the point."""
    value = Decimal(coefficient).scaleb(exponent) if coefficient else Decimal(0)
    if value and not -130 <= value.adjusted() <= 125:
        return
    whole, _, fraction = f"{abs(value):f}".partition(".")
    pairs = _pairs(
        whole.rjust(len(whole) + len(whole) % 2, "0"), fraction.ljust(len(fraction) + len(fraction) % 2, "0")
    )
    expected = 1 + max(pairs, 1) + (value < 0)
    assert stored_size(value) == expected <= 22


def _pairs(whole: str, fraction: str) -> int:
    """The pairs from the first to the last that is not zero."""
    digits = whole + fraction
    found = [at for at in range(0, len(digits), 2) if digits[at : at + 2] != "00"]
    return (found[-1] - found[0]) // 2 + 1 if found else 0


@pytest.mark.parametrize(
    "text",
    ["0e500", "0E-500", "-0e500", "0.000e999", "0." + "0" * 200],
)
def test_a_zero_is_zero_whatever_its_exponent(text: str) -> None:
    """DynamoDB would refuse the exponent, though the number is one that it can hold."""
    value = exactjson.loads(f'{{"n":{text}}}')
    assert to_attribute(value) == {"M": {"n": {"N": "0"}}}
    assert stored_size(value) == 3 + 1 + 1 + 2
    assert exactjson.canonical(value) == b'{"n":0}'


@pytest.mark.parametrize("text", ["1e500", "1e-500", "1e99999999999999999999", "0.1e-99999999999999999999"])
def test_a_number_out_of_range_stays_refused(text: str) -> None:
    """Only zero has no magnitude."""
    with pytest.raises(ValueError, match=r"number out of range|outside 1E-130"):
        to_attribute(exactjson.loads(text))


# -- names and nesting, with the field


def field_error(data: Any) -> FieldError:
    validator = Validator(entities=Entities(), max_record_bytes=2**22)
    with pytest.raises(FieldError) as caught:
        validator.read({"op": "insert", "entity": "e", "key": "k", "data": data})
    return caught.value


@pytest.mark.parametrize("name", ["n" * (MAX_NAME + 1), "é" * (MAX_NAME // 2 + 1)], ids=["ascii", "UTF-8"])
@pytest.mark.parametrize("padding", [0, 200_000], ids=["small", "measured"])
def test_a_name_that_is_too_long_is_refused(name: str, padding: int) -> None:
    """AWS takes names of up to 64 KB less one byte; the error shows the beginning of the name, and where it is."""
    error = field_error({"a": [{name: 1}], "padding": "x" * padding})
    assert error.field == "data.a[0]"
    assert error.why == f"name {name[:40]!r}... has {len(name.encode())} bytes, expected 1 to {MAX_NAME}"


@pytest.mark.parametrize(
    ("data", "field"),
    [({"": 1}, "data"), ({"a": {"b": [0, {"": {}}]}}, "data.a.b[1]"), ({"é": 1, "": 2}, "data")],
)
def test_a_name_that_is_empty_is_refused(data: Any, field: str) -> None:
    """AWS takes none, whatever an emulator does."""
    error = field_error(data)
    assert (error.field, error.why) == (field, f"name '' has 0 bytes, expected 1 to {MAX_NAME}")


def test_the_longest_names_are_taken() -> None:
    """Many names may be longer together, and one has its own limit."""
    names = {"n" * MAX_NAME: 1, "m" * MAX_NAME: 2, "é" * (MAX_NAME // 2): 3}
    assert to_attribute(names)["M"].keys() == names.keys()
    assert stored_size(names) == 3 + sum(1 + len(name.encode()) + 2 for name in names)


def nested(levels: int) -> dict[str, Any]:
    """`data` of that many maps, the outermost included; a number in the innermost."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    found: dict[str, Any] = value
    return found


def test_nesting_counts_data_itself() -> None:
    """DynamoDB has 32 levels: `data` is the first, and the value in the 31st map the last."""
    assert MAX_NESTING == 31
    for walk in (to_attribute, stored_size):
        walk(nested(31))
        with pytest.raises(Unstorable) as caught:
            walk(nested(32))
        assert caught.value.path == ".a" * 31
    error = field_error(nested(32))
    assert error.field == "data" + ".a" * 31
    assert error.why == "nested deeper than 31 levels"
