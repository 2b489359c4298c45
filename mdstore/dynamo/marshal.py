"""Python values to and from DynamoDB JSON, exact to the 38 digits that DynamoDB keeps.

DynamoDB JSON names the type of each value: `{"S": "text"}`, `{"N": "1.5"}`, `{"M": {...}}`
(https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Programming.LowLevelAPI.html).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from mdstore import exactjson

AttributeValue = dict[str, Any]
Item = dict[str, AttributeValue]


def to_attribute(value: Any) -> AttributeValue:  # noqa: PLR0911  one return a type
    """Marshal a JSON value (or bytes). Raises `TypeError` for any other type, float included: it has no exact decimal."""
    kind = type(value)
    if kind is str:
        return {"S": value}
    if kind is int or kind is Decimal:
        return {"N": str(value)}
    if kind is dict:
        return {"M": {name: to_attribute(item) for name, item in value.items()}}
    if value is None:
        return {"NULL": True}
    if kind is bool:
        return {"BOOL": value}
    if kind is list or kind is tuple:
        return {"L": [to_attribute(item) for item in value]}
    if kind is bytes:
        return {"B": base64.b64encode(value).decode("ascii")}
    if isinstance(value, str):  # a StrEnum
        return {"S": str(value)}
    raise TypeError(f"{kind.__name__} cannot be stored in DynamoDB")


def to_item(values: Mapping[str, Any]) -> Item:
    """Marshal a mapping of attribute names to values; a value of None is left out."""
    return {name: to_attribute(value) for name, value in values.items() if value is not None}


_READ: Mapping[str, Callable[[Any], Any]] = {
    "S": lambda raw: raw,
    "N": exactjson.number,
    "M": lambda raw: {name: from_attribute(item) for name, item in raw.items()},
    "L": lambda raw: [from_attribute(item) for item in raw],
    "BOOL": lambda raw: raw,
    "NULL": lambda _: None,
    "B": base64.b64decode,
    "SS": set,
    "NS": lambda raw: {exactjson.number(item) for item in raw},
}


def from_attribute(attribute: AttributeValue) -> Any:
    """Unmarshal one value. Numbers become int where integral, else `Decimal`; sets become Python sets."""
    ((kind, raw),) = attribute.items()
    return _READ[kind](raw)


def from_item(item: Item) -> dict[str, Any]:
    """Unmarshal an item."""
    return {name: from_attribute(value) for name, value in item.items()}


def item_size(item: Item) -> int:
    """Bytes that DynamoDB counts for an item.

    Source: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html
    """
    return sum(len(name.encode()) + attribute_size(value) for name, value in item.items())


def attribute_size(attribute: AttributeValue) -> int:
    """Bytes that DynamoDB counts for a value; numbers at their most (a digit pair a byte, and sign and exponent)."""
    ((kind, raw),) = attribute.items()
    if kind == "S":
        return len(raw.encode())
    if kind == "N":
        return min(21, len(raw) // 2 + 3)
    if kind == "M":
        return 3 + sum(1 + len(name.encode()) + attribute_size(item) for name, item in raw.items())
    if kind == "L":
        return 3 + sum(1 + attribute_size(item) for item in raw)
    if kind == "B":
        return len(raw) * 3 // 4
    return 1
