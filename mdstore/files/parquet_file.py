"""Reads Parquet files. Their values become JSON by one rule, which `docs/files.md` describes.

Text, booleans and numbers stay as they are; decimals are exact numbers. Dates, times and timestamps become text in ISO 8601,
and binary values become base64. Lists become arrays; structs, and maps from text, become objects.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from functools import partial
from types import ModuleType
from typing import Any

from mdstore.errors import InvalidRequest
from mdstore.files.rows import Rows, check_unique
from mdstore.store.validation import FieldError

Row = dict[str, Any] | FieldError
_Convert = Callable[[Any], Any]
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def columns(path: str, rows: Rows) -> list[str]:
    """Return the names of the columns. Raises `InvalidRequest` if the file cannot be loaded as `rows`."""
    pa, parquet = _pyarrow(path)
    try:
        schema = parquet.read_schema(path)
    except pa.ArrowException as error:
        raise _not_parquet(path, error) from error
    rows.check_columns(schema.names, path=path)
    key = schema.field(rows.key).type
    kind = key.value_type if pa.types.is_dictionary(key) else key
    if not (_is_text(pa, kind) or pa.types.is_integer(kind)):
        raise InvalidRequest(
            field="--key", value=f"{rows.key} ({key})", expected=f"a column of text or integers in {path}"
        )
    for column in schema:
        _check_type(pa, column.type, column.name, path)
    return list(schema.names)


def records(path: str) -> Iterator[tuple[int, Row]]:
    """Yield each row with its number, counted from 1. A row with a value that JSON cannot hold becomes a `FieldError`."""
    pa, parquet = _pyarrow(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            converters = [_converter(pa, column.type) for column in file.schema_arrow]
            for batch in file.iter_batches(batch_size=1_000):
                values = [_plain_values(pa, column) for column in batch.columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, _converted(names, converters, row)
    except pa.ArrowException as error:
        raise _not_parquet(f"{path}, after row {number}", error) from error


def _pyarrow(path: str) -> tuple[Any, ModuleType]:
    try:
        import pyarrow as pa  # noqa: PLC0415  only Parquet files need this optional dependency
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        expected = 'pyarrow to be installed: pip install "mdstore[files]"'
        raise InvalidRequest(field="file", value=path, expected=expected) from error
    return pa, parquet


def _not_parquet(where: str, error: Exception) -> InvalidRequest:
    return InvalidRequest(field="file", value=where, expected=f"a whole Parquet file ({error})")


def _converted(names: list[str], converters: list[_Convert | None], row: tuple[Any, ...]) -> Row:
    found = dict(zip(names, row, strict=True))
    for name, convert in zip(names, converters, strict=True):
        if convert is not None and found[name] is not None:
            try:
                found[name] = convert(found[name])
            except OverflowError:
                return FieldError(f"data.{name}", "a date outside of the years 1 to 9999")
            except ValueError as error:
                return FieldError(f"data.{name}", str(error))
    return found


def _is_text(pa: Any, kind: Any) -> bool:
    is_view = getattr(pa.types, "is_string_view", lambda _: False)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_view(kind))


def _is_binary(pa: Any, kind: Any) -> bool:
    is_view = getattr(pa.types, "is_binary_view", lambda _: False)
    types = pa.types
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or is_view(kind)
    )


def _is_list(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_type(pa: Any, kind: Any, name: str, path: str) -> None:
    """Raise `InvalidRequest` for a column whose type JSON cannot hold, or whose struct repeats a field."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        _check_type(pa, kind.storage_type, name, path)
    elif types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        check_unique([f"{name}.{one.name}" for one in fields], field="file", path=path)
        for one in fields:
            _check_type(pa, one.type, f"{name}.{one.name}", path)
    elif _is_list(pa, kind) or types.is_dictionary(kind):
        _check_type(pa, kind.value_type, name, path)
    elif types.is_map(kind) and _is_text(pa, kind.key_type):
        _check_type(pa, kind.item_type, name, path)
    elif not (
        _is_text(pa, kind) or _is_binary(pa, kind) or types.is_null(kind) or types.is_boolean(kind)
        or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
        or types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind)
    ):  # fmt: skip
        raise InvalidRequest(
            field="file", value=f"{name} ({kind})", expected=f"columns in {path} of types that JSON has"
        )


def _plain_values(pa: Any, array: Any) -> list[Any]:
    """Return a column's values, with integers for dates and times: Python's own types do not hold all of them."""
    return list(array.cast(_plain_type(pa, array.type)).to_pylist())


def _plain_type(pa: Any, kind: Any) -> Any:  # noqa: PLR0911  one return per type
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(pa, kind.storage_type)
    if types.is_dictionary(kind):
        return _plain_type(pa, kind.value_type)
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_date64(kind) or types.is_time64(kind) or types.is_timestamp(kind):
        return pa.int64()
    if types.is_float16(kind):
        return pa.float32()
    if types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([pa.field(one.name, _plain_type(pa, one.type), nullable=one.nullable) for one in fields])
    if types.is_map(kind):
        return pa.map_(kind.key_type, _plain_type(pa, kind.item_type))
    if _is_list(pa, kind):
        return pa.large_list(_plain_type(pa, kind.value_type)) if types.is_large_list(kind) else _plain_list(pa, kind)
    return kind


def _plain_list(pa: Any, kind: Any) -> Any:
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
    return pa.list_(_plain_type(pa, kind.value_type), size)


def _converter(pa: Any, kind: Any) -> _Convert | None:  # noqa: PLR0911  one return per type
    """Return the function that turns a plain value of type `kind` into JSON, or None if the value is JSON already."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        is_uuid = getattr(kind, "extension_name", "") == "arrow.uuid"
        return _uuid if is_uuid else _converter(pa, kind.storage_type)
    if types.is_dictionary(kind):
        return _converter(pa, kind.value_type)
    if types.is_date32(kind):
        return _date
    if types.is_date64(kind):
        return lambda milliseconds: _date(milliseconds // 86_400_000)
    if types.is_time(kind):
        return partial(_time, per_second=_PER_SECOND[kind.unit])
    if types.is_timestamp(kind):
        return partial(_timestamp, per_second=_PER_SECOND[kind.unit], suffix="Z" if kind.tz else "")
    if _is_binary(pa, kind):
        return lambda value: base64.b64encode(value).decode()
    if types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return partial(_struct, converters={one.name: _converter(pa, one.type) for one in fields})
    if types.is_map(kind):
        return partial(_map, convert=_converter(pa, kind.item_type))
    if _is_list(pa, kind) and (convert := _converter(pa, kind.value_type)):
        return lambda values: [None if value is None else convert(value) for value in values]
    return None


def _struct(value: dict[str, Any], *, converters: dict[str, _Convert | None]) -> dict[str, Any]:
    return {name: _apply(converters[name], item) for name, item in value.items()}


def _map(pairs: list[tuple[str, Any]], *, convert: _Convert | None) -> dict[str, Any]:
    found = {name: _apply(convert, item) for name, item in pairs}
    if len(found) < len(pairs):
        raise ValueError("the map has a key twice")
    return found


def _apply(convert: _Convert | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)


def _uuid(value: bytes) -> str:
    return str(uuid.UUID(bytes=value))


def _date(days: int) -> str:
    return (date(1970, 1, 1) + timedelta(days=days)).isoformat()


def _time(value: int, *, per_second: int) -> str:
    seconds, fraction = divmod(value, per_second)
    return time(seconds // 3600, seconds // 60 % 60, seconds % 60).isoformat() + _fraction(fraction, per_second)


def _timestamp(value: int, *, per_second: int, suffix: str) -> str:
    seconds, fraction = divmod(value, per_second)
    moment = datetime(1970, 1, 1) + timedelta(seconds=seconds)  # `suffix` is the zone
    return moment.isoformat() + _fraction(fraction, per_second) + suffix


def _fraction(value: int, per_second: int) -> str:
    """Return the fraction of a second as text without trailing zeros, or an empty text if it is zero."""
    digits = f"{value:0{len(str(per_second)) - 1}d}" if value else ""
    return f".{digits.rstrip('0')}" if value else ""
