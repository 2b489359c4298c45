"""Turns the rows of a file into operations. A row is data, and never an operation of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mdstore.errors import InvalidRequest
from mdstore.model import OpName
from mdstore.store.operations import OPERATIONS
from mdstore.store.validation import FieldError, check_entity

#: The fields of an operation that a column may hold, besides the key.
FIELDS = ("op", "sequence", "expect_version", "group")
_INTEGER_FIELDS = ("sequence", "expect_version")
_WITHOUT_DATA = [op for op, spec in OPERATIONS.items() if not spec.needs_data]
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Describes how rows become operations: each one an operation `op` on `entity` whose key is in the column `key`.

    `fields` maps fields of an operation (see `FIELDS`) to the columns that hold them. All other columns are the data. Raises
    `InvalidRequest` if the entity's name or a field is invalid, or if two fields share a column.
    """

    entity: str
    key: str
    op: OpName = "upsert"
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_entity(self.entity)
        except FieldError as error:
            raise InvalidRequest(field="--entity", value=self.entity, expected=f"a name that {error.why}") from error
        for name in self.fields:
            if name not in FIELDS:
                raise InvalidRequest(field="--column", value=name, expected=f"one of {', '.join(FIELDS)}")
        check_unique([self.key, *self.fields.values()], field="--column")

    def check_columns(self, columns: Sequence[str], *, path: str) -> None:
        """Raise `InvalidRequest` if a column is named twice, or one that holds the key or a field is missing."""
        check_unique(columns, field="file", path=path)
        for option, column in (("--key", self.key), *(("--column", one) for one in self.fields.values())):
            if column not in columns:
                shown = ", ".join(columns) or "of a header line, but the file is empty"
                raise InvalidRequest(field=option, value=column, expected=f"one of the columns {shown} of {path}")

    def operation(self, row: Mapping[str, Any]) -> dict[str, Any] | FieldError:
        """Return the operation of a row, or the reason why the row cannot be one."""
        data = dict(row)
        if self.key not in data:
            return FieldError(self.key, "the record lacks this field, which --key names")
        operation = {"op": self.op, "entity": self.entity, "key": _key(data.pop(self.key))}
        for name, column in self.fields.items():
            value = data.pop(column, None)
            if value not in (None, ""):
                operation[name] = _integer(value) if name in _INTEGER_FIELDS else value
        return operation if operation["op"] in _WITHOUT_DATA else operation | {"data": data}


def check_unique(names: Sequence[str], *, field: str, path: str = "") -> None:
    """Raise `InvalidRequest` if one of `names` occurs twice, because the value of one of them would be lost."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        where = f" in {path}" if path else ""
        raise InvalidRequest(field=field, value=", ".join(twice), expected=f"columns that are named once{where}")


def _key(value: Any) -> Any:
    """Return a key as text. Only text and integers can be keys; validation refuses any other value, and names its type."""
    return str(value) if type(value) is int else value


def _integer(value: Any) -> Any:
    """Parse a text that is an integer, and return any other value for validation to refuse."""
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value
