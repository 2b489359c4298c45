"""Conversion between Python values and DynamoDB JSON, without loss.

DynamoDB JSON names the type of each value: `{"S": "text"}`, `{"N": "1.5"}`, `{"M": {...}}`
(https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Programming.LowLevelAPI.html). Values that
DynamoDB cannot hold exactly (39 digits, a lone surrogate, 32 levels) raise `Unstorable` instead of being rounded.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from mdstore import exactjson

AttributeValue = dict[str, Any]
Item = dict[str, AttributeValue]

#: Limits of DynamoDB's data types (https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html).
MAX_DIGITS = 38
MAX_NESTING = (
    31  # maps and lists: an attribute is level 1, and what its 31st map or list holds is level 32, the deepest allowed
)
MAX_NAME = 65_535  # bytes
_MOST, _LEAST = 10**MAX_DIGITS, -(10**MAX_DIGITS)
_NULL: AttributeValue = {"NULL": True}
_TRUE: AttributeValue = {"BOOL": True}
_FALSE: AttributeValue = {"BOOL": False}


class Unstorable(ValueError):
    """DynamoDB cannot hold a value exactly. `path` leads to it (`.name[3]`, or empty for the value itself); `why` says why."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.path, self.why = "", why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}" if self.path else self.why


def to_attribute(value: Any, depth: int = 1) -> AttributeValue:  # noqa: PLR0911  one return per type
    """Marshal a JSON value. A float becomes the shortest decimal that reads as the same float. Raises `Unstorable`.

    `depth` is the nesting level of the value itself, if it is a map or list. Do not change the result: its parts may be shared.
    """
    kind = type(value)
    if kind is str:
        return {"S": value if value.isascii() else _utf8(value)}
    if kind is int:
        return {"N": str(value) if _LEAST < value < _MOST else _number(Decimal(value))}
    if kind is dict:
        return {"M": _members(value, depth)}
    if kind is float:
        text = repr(value)
        return {"N": text if "e" not in text and "n" not in text else _number(Decimal(text))}  # 1e+16, nan, inf
    if kind is Decimal:
        return {"N": _number(value)}
    if value is None:
        return _NULL
    if kind is bool:
        return _TRUE if value else _FALSE
    if kind is list or kind is tuple:
        return {"L": _elements(value, depth)}
    if isinstance(value, str):  # a StrEnum
        return {"S": _utf8(str(value))}
    raise Unstorable(f"{kind.__name__} is not a JSON type")


def _members(value: dict[str, Any], depth: int) -> dict[str, AttributeValue]:
    _check_depth(depth)
    _check_names(value)
    members: dict[str, AttributeValue] = {}
    name = ""
    try:
        for name, item in value.items():
            if type(item) is str and item.isascii():  # the most common case saves a call
                members[name] = {"S": item}
            else:
                members[name] = to_attribute(item, depth + 1)
    except Unstorable as error:
        error.path = f".{name}{error.path}"
        raise
    return members


def _elements(value: list[Any] | tuple[Any, ...], depth: int) -> list[AttributeValue]:
    _check_depth(depth)
    elements: list[AttributeValue] = []
    try:
        for item in value:
            elements.append(to_attribute(item, depth + 1))  # noqa: PERF401  on an error, the length is the index of the element
    except Unstorable as error:
        error.path = f"[{len(elements)}]{error.path}"
        raise
    return elements


def stored_size(value: Any, depth: int = 1) -> int:
    """Return the bytes that DynamoDB counts for a JSON value. Raises `Unstorable`.

    Measure large values before marshalling them: measuring takes no memory, marshalling a hundred bytes per number.
    Source: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html
    """
    if isinstance(value, dict):
        _check_depth(depth)
        _check_names(value)
        return 3 + sum(
            1 + len(name.encode()) + _size_within(item, depth + 1, f".{name}") for name, item in value.items()
        )
    if isinstance(value, list | tuple):
        _check_depth(depth)
        return 3 + sum(1 + _size_within(item, depth + 1, f"[{index}]") for index, item in enumerate(value))
    ((kind, raw),) = to_attribute(value).items()
    if kind == "S":
        return len(raw.encode())
    return _number_size(Decimal(raw)) if kind == "N" else 1


def _number_size(value: Decimal) -> int:
    """Return 1 + the pairs of digits, counted from the decimal point both ways, + 1 for a minus: at most 22.

    Zeros at both ends count nothing, except that we count a zero as one pair, because AWS calls its own formula approximate.
    """
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)  # noqa: S101  `to_attribute` refuses NaN and infinity
    if not value:
        return 2 + sign
    lowest = exponent + len(digits) - len("".join(map(str, digits)).rstrip("0"))
    return 2 + value.adjusted() // 2 - lowest // 2 + sign


def _size_within(item: Any, depth: int, step: str) -> int:
    try:
        return stored_size(item, depth)
    except Unstorable as error:
        error.path = step + error.path
        raise


def _check_depth(depth: int) -> None:
    if depth > MAX_NESTING:
        raise Unstorable(f"nested deeper than {MAX_NESTING} levels")


def _check_names(value: dict[str, Any]) -> None:
    try:
        names = "".join(value)
        if names.isascii() and len(names) <= MAX_NAME and "" not in value:  # the most common case
            return
    except TypeError:
        pass
    for name in value:
        if type(name) is not str:
            raise Unstorable(f"name {name!r} is not text")
        size = len(_utf8(name).encode())
        if not 0 < size <= MAX_NAME:
            shown = repr(name) if len(name) <= 40 else repr(name[:40]) + "..."
            raise Unstorable(f"name {shown} has {size} bytes, expected 1 to {MAX_NAME}")


def _number(value: Decimal) -> str:
    text = str(value)
    if (
        len(text) <= MAX_DIGITS and "E" not in text and "N" not in text and text[-1].isdigit()
    ):  # "N" because a NaN may end with digits
        return text
    if not value.is_finite():
        raise Unstorable(f"{value} is not a JSON number")
    if not value:
        return "0"  # 0E+500 too, whose exponent DynamoDB does not take
    if len(text) > MAX_DIGITS:  # signs, points and trailing zeros are not significant digits
        digits = "".join(map(str, value.as_tuple().digits)).rstrip("0")
        if len(digits) > MAX_DIGITS:
            raise Unstorable(f"{len(digits)} significant digits, at most {MAX_DIGITS} can be stored exactly")
    if not -130 <= value.adjusted() <= 125:
        raise Unstorable(f"magnitude 1E{value.adjusted():+d} is outside 1E-130 to 9.9E+125")
    return text


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unstorable(f"not valid Unicode at character {error.start}") from error
    return text


def to_item(values: Mapping[str, Any]) -> Item:
    """Marshal a mapping of attribute names to values. Values of None are left out."""
    return {
        name: {"S": value} if type(value) is str and value.isascii() else to_attribute(value)
        for name, value in values.items()
        if value is not None
    }


_READ: Mapping[str, Callable[[Any], Any]] = {
    "S": lambda raw: raw,
    "N": exactjson.number,
    "M": lambda raw: {name: from_attribute(item) for name, item in raw.items()},
    "L": lambda raw: [from_attribute(item) for item in raw],
    "BOOL": lambda raw: raw,
    "NULL": lambda _: None,
    "B": base64.b64decode,
    "BS": lambda raw: set(map(base64.b64decode, raw)),
    "SS": set,
    "NS": lambda raw: {exactjson.number(item) for item in raw},
}


def from_attribute(attribute: AttributeValue) -> Any:
    """Unmarshal one value. Integral numbers become int, others `Decimal`; sets become Python sets."""
    ((kind, raw),) = attribute.items()
    return _READ[kind](raw)


def from_item(item: Item) -> dict[str, Any]:
    """Unmarshal an item."""
    return {name: from_attribute(value) for name, value in item.items()}


def is_small(item: Item, most: int = 2_000) -> bool:
    """Return whether an item has at most `most` values, which are unmarshalled within milliseconds."""
    values = list(item.values())
    for value in values:  # it grows
        values += value.get("M", {}).values() or value.get("L", ())
        if len(values) > most:
            return False
    return True
