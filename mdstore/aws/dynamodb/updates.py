"""The one builder of conditional writes: the expressions of UpdateItem, PutItem and transaction actions.

Every attribute is named by a placeholder (`#state` for `state`), because many words are reserved in DynamoDB. Callers write
right-hand sides and conditions in DynamoDB's grammar
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
    set: Mapping[str, str] = _NOTHING,  # noqa: A002  DynamoDB's keyword
    add: Mapping[str, str] = _NOTHING,
    remove: Iterable[str] = (),
    condition: str = "",
    names: Mapping[str, str] = _NOTHING,
) -> dict[str, Any]:
    """Build the expressions of a write, and the names behind their placeholders.

    `set` and `add` map attributes to right-hand sides, as in `{"version": "#version + :one"}`; see `given` and `unless_set`.
    `names` maps placeholders to attributes whose names contain other characters: `{"until": "until#3"}` for `#until`.
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
    """Return right-hand sides that set each attribute to the value of the same name: `{"state": ":state"}`."""
    return {name: f":{name}" for name in names}


def unless_set(names: Iterable[str]) -> dict[str, str]:
    """Return right-hand sides that set each attribute only if the item does not have it."""
    return {name: f"if_not_exists(#{name}, :{name})" for name in names}


def placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` under the names that expressions use for them: `{":state": ...}`."""
    return {f":{name}": value for name, value in values.items()}
