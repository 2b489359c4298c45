"""The one builder of conditional writes: expressions of UpdateItem, PutItem and the actions of a transaction.

Every attribute is named by a placeholder (`#state` for `state`), because DynamoDB reserves many words. Right-hand sides and
conditions are written in DynamoDB's own grammar
(https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Expressions.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

_NAME = re.compile(r"#(\w+)")
_NOTHING: Mapping[str, str] = MappingProxyType({})


def expressions(
    *,
    set: Mapping[str, str] = _NOTHING,  # noqa: A002  DynamoDB's own words
    add: Mapping[str, str] = _NOTHING,
    remove: Iterable[str] = (),
    condition: str = "",
    names: Mapping[str, str] = _NOTHING,
) -> dict[str, Any]:
    """The expressions of a write, and the names behind their placeholders.

    `set` and `add` map attributes to right-hand sides, as in `{"version": "#version + :one"}`; see `given` and `unless_set`.
    `names` has the attributes whose names are no words: `{"until": "until#3"}` for the placeholder `#until`.
    """
    clauses = [
        ("SET", [f"#{name} = {value}" for name, value in set.items()]),
        ("ADD", [f"#{name} {value}" for name, value in add.items()]),
        ("REMOVE", [f"#{name}" for name in remove]),
    ]
    parts = {
        "UpdateExpression": " ".join(f"{verb} {', '.join(changes)}" for verb, changes in clauses if changes),
        "ConditionExpression": condition,
    }
    found: dict[str, Any] = {name: text for name, text in parts.items() if text}
    placeholders = dict.fromkeys(_NAME.findall(" ".join(parts.values())))
    if placeholders:
        found["ExpressionAttributeNames"] = {f"#{name}": names.get(name, name) for name in placeholders}
    return found


def given(names: Iterable[str]) -> dict[str, str]:
    """Right-hand sides that set each attribute to the value of its own name."""
    return {name: f":{name}" for name in names}


def unless_set(names: Iterable[str]) -> dict[str, str]:
    """Right-hand sides that set only attributes which the item does not have."""
    return {name: f"if_not_exists(#{name}, :{name})" for name in names}


def placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under the names that expressions know them by: `{":state": ...}`."""
    return {f":{name}": value for name, value in values.items()}
