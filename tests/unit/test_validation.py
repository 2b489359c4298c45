"""The rules for one operation. Each broken rule yields the field and the reason that the caller gets."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import from_attribute, to_attribute
from mdstore.model import Operation, Reason
from mdstore.store.entities import Entities
from mdstore.store.validation import MAX_INLINE, FieldError, Validator

MAX_RECORD_BYTES = 20_000
validator = Validator(entities=Entities(), max_record_bytes=MAX_RECORD_BYTES)


def given_as(**changes: Any) -> dict[str, Any]:
    """Return a valid insert with changes; a value of `...` leaves the field out."""
    fields = {"op": "insert", "entity": "airport", "key": "KJFK", "data": {}, **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def error_of(source: bytes | str | Mapping[str, Any] | Operation, using: Validator = validator) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        using.read(source)
    assert caught.value.reason is Reason.INVALID
    return caught.value.field, caught.value.why


def line_with(number: str) -> bytes:
    return b'{"op":"insert","entity":"e","key":"k","data":{"a":[%b]}}' % number.encode()


KEY_SIZE = "must have 1-1024 bytes as UTF-8, has {}"
ENTITY_RULE = "must be 1-64 of A-Z a-z 0-9 _ . -, starting with a letter: {!r}"
SEQUENCE_RULE = "must be between -10^37 and 10^37, and not be given with check"
VERSION_RULE = "must be between 1 and 10^37, and not be given with insert"
GROUP_RULE = "must have 1-128 characters"

INVALID = {
    "unknown op": (given_as(op="drop"), "op", "Invalid enum value 'drop'"),
    "op in capitals": (given_as(op="INSERT"), "op", "Invalid enum value 'INSERT'"),
    "no op": (given_as(op=...), "op", "Object missing required field `op`"),
    "no entity": (given_as(entity=...), "entity", "Object missing required field `entity`"),
    "no key": (given_as(key=...), "key", "Object missing required field `key`"),
    "unknown field": (given_as(colour="red"), "colour", "Object contains unknown field `colour`"),
    "key is a number": (given_as(key=5), "key", "Expected `str`, got `int`"),
    "key is null": (given_as(key=None), "key", "Expected `str`, got `null`"),
    "data is a list": (given_as(data=[]), "data", "Expected `object | null`, got `array`"),
    "version is text": (given_as(expect_version="1"), "expect_version", "Expected `int | null`, got `str`"),
    "version is true": (given_as(expect_version=True), "expect_version", "Expected `int | null`, got `bool`"),
    "sequence is a fraction": (given_as(sequence=1.5), "sequence", "Expected `int | null`, got `float`"),
    "group is a number": (given_as(group=1), "group", "Expected `str | null`, got `int`"),
    "empty key": (given_as(key=""), "key", KEY_SIZE.format(0)),
    "key of 1025 letters": (given_as(key="k" * 1025), "key", KEY_SIZE.format(1025)),
    "key of 1025 bytes": (given_as(key="é" * 512 + "k"), "key", KEY_SIZE.format(1025)),
    "newline in key": (given_as(key="a\nb"), "key", "must not hold control characters: 'a\\nb'"),
    "NUL in key": (given_as(key="\x00"), "key", "must not hold control characters: '\\x00'"),
    "DEL in key": (given_as(key="a\x7f"), "key", "must not hold control characters: 'a\\x7f'"),
    "half a surrogate pair in key": (given_as(key="ab\ud800"), "key", "not valid Unicode at character 2"),
    "empty entity": (given_as(entity=""), "entity", ENTITY_RULE.format("")),
    "entity begins with a digit": (given_as(entity="1a"), "entity", ENTITY_RULE.format("1a")),
    "hash in entity": (given_as(entity="a#b"), "entity", ENTITY_RULE.format("a#b")),
    "newline after entity": (given_as(entity="a\n"), "entity", ENTITY_RULE.format("a\n")),
    "umlaut in entity": (given_as(entity="ä"), "entity", ENTITY_RULE.format("ä")),
    "entity of 65": (given_as(entity="a" * 65), "entity", ENTITY_RULE.format("a" * 65)),
    **{
        f"{op} without data": (given_as(op=op, data=...), "data", f"{op} needs a JSON object")
        for op in ("insert", "update", "patch", "upsert")
    },
    **{f"{op} with data": (given_as(op=op), "data", f"{op} takes none") for op in ("delete", "check")},
    "version with insert": (given_as(expect_version=1), "expect_version", VERSION_RULE),
    "version 0": (given_as(op="update", expect_version=0), "expect_version", VERSION_RULE),
    "version below 0": (given_as(op="update", expect_version=-1), "expect_version", VERSION_RULE),
    "sequence too large": (given_as(sequence=10**37 + 1), "sequence", SEQUENCE_RULE.format(10**37 + 1)),
    "sequence too small": (given_as(sequence=-(10**37) - 1), "sequence", SEQUENCE_RULE.format(-(10**37) - 1)),
    "sequence with check": (given_as(op="check", data=..., sequence=1), "sequence", SEQUENCE_RULE.format(1)),
    "empty group": (given_as(group=""), "group", GROUP_RULE),
    "group of 129": (given_as(group="g" * 129), "group", GROUP_RULE),
    "NaN": (given_as(data={"a": float("nan")}), "data.a", "NaN is not a JSON number"),
    "infinity": (given_as(data={"a": float("-inf")}), "data.a", "-Infinity is not a JSON number"),
    "decimal NaN": (given_as(data={"a": Decimal("NaN")}), "data.a", "NaN is not a JSON number"),
    "39 digits": (
        given_as(data={"a": {"b": [0, 10**38 + 1]}}),
        "data.a.b[1]",
        "39 significant digits, at most 38 can be stored exactly",
    ),
    "39 digits of a fraction": (
        given_as(data={"a": Decimal("1." + "0" * 37 + "1")}),
        "data.a",
        "39 significant digits, at most 38 can be stored exactly",
    ),
    "1E+126": (given_as(data={"a": 10**126}), "data.a", "magnitude 1E+126 is outside 1E-130 to 9.9E+125"),
    "9E-131": (given_as(data={"a": Decimal("9E-131")}), "data.a", "magnitude 1E-131 is outside 1E-130 to 9.9E+125"),
    "float 1e300": (given_as(data={"a": 1e300}), "data.a", "magnitude 1E+300 is outside 1E-130 to 9.9E+125"),
    "bytes": (given_as(data={"a": b"x"}), "data.a", "bytes is not a JSON type"),
    "a set": (given_as(data={"a": [{1}]}), "data.a[0]", "set is not a JSON type"),
    "a number as a name": (given_as(data={"a": {1: 2}}), "data.a", "name 1 is not text"),
    "half a pair in text": (given_as(data={"a": ["x\udfff"]}), "data.a[0]", "not valid Unicode at character 1"),
    "half a pair in a name": (given_as(data={"a": {"\ud800": 1}}), "data.a", "not valid Unicode at character 0"),
    "not a mapping": (cast("Any", 5), "operation", "Expected `object`, got `int`"),
}


@pytest.mark.parametrize(("source", "field", "why"), INVALID.values(), ids=INVALID.keys())
def test_an_error_names_the_field_and_the_reason(source: Mapping[str, Any], field: str, why: str) -> None:
    """The error has the path of the field and the reason as text."""
    assert error_of(source) == (field, why)


LINES = {
    "unknown op": (b'{"op":"drop","entity":"e","key":"k"}', "op", "Invalid enum value 'drop'"),
    "no key": (b'{"op":"delete","entity":"e"}', "key", "Object missing required field `key`"),
    "unknown field": (b'{"op":"delete","entity":"e","key":"k","x":1}', "x", "Object contains unknown field `x`"),
    "wrong type": (b'{"op":"delete","entity":"e","key":1}', "key", "Expected `str`, got `int`"),
    "list": (b"[]", "operation", "Expected `object`, got `array`"),
    "5,000 digits": (line_with("7" * 5_000), "data[...][0]", "Integer value out of range"),
    "39 digits": (line_with("1" * 39), "data.a[0]", "39 significant digits, at most 38 can be stored exactly"),
    "1e126": (line_with("1e126"), "data.a[0]", "magnitude 1E+126 is outside 1E-130 to 9.9E+125"),
}


@pytest.mark.parametrize(("line", "field", "why"), LINES.values(), ids=LINES.keys())
def test_the_error_of_a_line_names_the_field_and_the_reason(line: bytes, field: str, why: str) -> None:
    """A line of JSON is validated like a mapping."""
    assert error_of(line) == (field, why)


MALFORMED = {
    "empty": (b"", "column 1: the text ends too early"),
    "cut off": (b'{"op":"del', "column 11: the text ends too early"),
    "two objects": (b'{"op":"delete","entity":"e","key":"k"}{}', "column 39: trailing characters"),
    "single quotes": (b"{'op':'delete'}", "column 2: object keys must be strings"),
    "NaN": (line_with("NaN"), "column 52: invalid character"),
    "half a surrogate pair": (line_with(r'"\ud800", "any text at all"'), "column 59: "),
    "not UTF-8": (line_with('"\xff"').replace("\xff".encode(), b"\xff"), "column 53: not UTF-8"),
    "3,000 levels": (line_with('{"a":' * 3_000 + "1" + "}" * 3_000), "nested too deeply"),
    "text that is not Unicode": ('{"op":"\udfff"}', "'utf-8' codec can't encode character"),
}


@pytest.mark.parametrize(("line", "why"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_line_that_cannot_be_decoded_is_an_error(line: bytes | str, why: str) -> None:
    """Broken or hostile text is refused with the place and the reason, and never read as anything else."""
    field, text = error_of(line)
    assert field == "line"
    assert text.startswith(f"not a JSON object of an operation: {why}")


@pytest.mark.parametrize(
    "source",
    [given_as(key=""), given_as(data={"a": [float("nan")]}), line_with("1e126")],
    ids=["key", "mapping", "line"],
)
def test_the_text_of_an_error_begins_with_its_field(source: Mapping[str, Any]) -> None:
    """The text becomes the detail of the refusal, so it names the field, however deeply nested."""
    with pytest.raises(FieldError) as caught:
        validator.read(source)
    assert str(caught.value) == f"{caught.value.field}: {caught.value.why}"


@pytest.mark.parametrize("number", ["1e99999999999999999999", "1e-99999999999999999999", "0e99999999999999999999"])
def test_an_exponent_beyond_all_bounds_is_an_error(number: str) -> None:
    """A number that Python cannot even parse is an error of the operation, and not a crash."""
    with pytest.raises(FieldError):
        validator.read(line_with(number))


def test_a_sequence_of_5000_digits_is_an_error() -> None:
    """An integer too long to be printed is reported like any other that is out of bounds."""
    with pytest.raises(FieldError) as caught:
        validator.read(given_as(sequence=10**5_000))
    assert caught.value.field == "sequence"


def test_half_a_surrogate_pair_in_a_group_is_an_error() -> None:
    """A group must be valid Unicode, like a key."""
    assert error_of(given_as(group="g\ud800")) == ("group", "not valid Unicode at character 1")


@pytest.mark.parametrize("name", [1, "\ud800"])
def test_an_invalid_name_at_the_top_of_data_is_an_error_of_data(name: object) -> None:
    """A name at the top level has no other parent than `data`."""
    with pytest.raises(FieldError) as caught:
        validator.read(given_as(data={name: 1}))
    assert caught.value.field == "data"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("op", {"op": "drop", "data": None}),
        ("entity", {"entity": 5}),
        ("key", {"key": 5}),
        ("data", {"data": [1]}),
        ("expect_version", {"expect_version": "1"}),
        ("sequence", {"sequence": "1"}),
        ("group", {"group": 5}),
    ],
)
def test_an_operation_object_with_a_wrong_type_is_an_error(field: str, changes: dict[str, Any]) -> None:
    """An `Operation` is validated like a line, because a lane must not hold what a worker cannot decode."""
    operation = msgspec.structs.replace(Operation(op="update", entity="e", key="k", data={}), **changes)
    with pytest.raises(FieldError) as caught:
        validator.read(operation)
    assert caught.value.field == field


ACCEPTED = {
    "key of 1 byte": given_as(key="k"),
    "key of 1024 bytes": given_as(key="é" * 512),
    "key with a hash": given_as(key="#/ :"),
    "entity of 64": given_as(entity="a" * 64),
    "entity with all signs": given_as(entity="A9_.-"),
    "version 1": given_as(op="check", data=..., expect_version=1),
    "sequence 10^37": given_as(sequence=10**37),
    "sequence -10^37": given_as(sequence=-(10**37)),
    "sequence 0": given_as(sequence=0),
    "group of 128 emoji": given_as(group="😀" * 128),
    "38 digits": given_as(data={"a": -(10**38 - 1)}),
    "trailing zeros of an integer": given_as(data={"a": (10**38 - 1) * 10**80}),
    "trailing zeros of a fraction": given_as(data={"a": Decimal("1." + "0" * 60)}),
    "9.9E+125": given_as(data={"a": Decimal("9." + "9" * 37 + "E+125")}),
    "1E-130": given_as(data={"a": Decimal("1E-130")}),
    "a float": given_as(data={"a": 0.1}),
    "a tuple": given_as(data={"a": (1, 2)}),
    "a frozen mapping": MappingProxyType(given_as()),
    "an operation": Operation(op="insert", entity="e", key="k", data={}),
    "text": '{"op":"delete","entity":"e","key":"ü"}',
}


@pytest.mark.parametrize("source", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_operations_at_the_bounds_are_accepted(source: Mapping[str, Any]) -> None:
    """The bounds themselves are allowed."""
    operation, attribute = validator.read(source)
    again = exactjson.dumps(operation)
    assert same(msgspec.structs.asdict(Validator.decode(again)), msgspec.structs.asdict(operation))
    assert same(stored(attribute), operation.data)


def nested(levels: int) -> dict[str, Any]:
    data: dict[str, Any] = {"a": "leaf"}
    for _ in range(levels - 1):
        data = {"a": data}
    return data


def test_data_may_have_31_levels() -> None:
    """DynamoDB's 32 levels are `data` and 31 more. The error names the object that is too deep."""
    validator.read(given_as(data=nested(31)))
    assert error_of(given_as(data=nested(32))) == ("data" + ".a" * 31, "nested deeper than 31 levels")


def test_lists_count_as_levels() -> None:
    """A list is a level, like an object."""
    data: Any = "leaf"
    for _ in range(31):
        data = [data]
    assert error_of(given_as(data={"a": data})) == ("data.a" + "[0]" * 30, "nested deeper than 31 levels")
    validator.read(given_as(data={"a": data[0]}))


def test_an_operation_that_is_too_large_has_a_reason_of_its_own() -> None:
    """The size that counts is that of the operation's JSON; exactly the limit is allowed."""
    overhead = len(exactjson.dumps(validator.read(given_as(data={"a": ""}))[0]))
    validator.read(given_as(data={"a": "x" * (MAX_RECORD_BYTES - overhead)}))
    with pytest.raises(FieldError) as caught:
        validator.read(given_as(data={"a": "x" * (MAX_RECORD_BYTES - overhead + 1)}))
    assert (caught.value.field, caught.value.why, caught.value.reason) == (
        "data",
        f"{MAX_RECORD_BYTES + 1} bytes as JSON, at most {MAX_RECORD_BYTES} are allowed",
        Reason.TOO_LARGE,
    )


class Runway(BaseModel):
    length: int = Field(gt=0)


class Airport(BaseModel):
    name: str
    runways: list[Runway] = []


bound = Validator(entities=Entities({"airport": Airport}), max_record_bytes=MAX_RECORD_BYTES)
strict = Validator(entities=Entities({"airport": Airport}, strict=True), max_record_bytes=MAX_RECORD_BYTES)


@pytest.mark.parametrize(
    ("data", "field", "why"),
    [
        ({}, "data.name", "Field required"),
        ({"name": 5}, "data.name", "Input should be a valid string"),
        (
            {"name": "x", "runways": [{"length": 1}, {"length": 0}]},
            "data.runways.1.length",
            "Input should be greater than 0",
        ),
    ],
)
@pytest.mark.parametrize("op", ["insert", "update", "upsert"])
def test_data_that_does_not_fit_its_model_is_an_error(op: str, data: Any, field: str, why: str) -> None:
    """The error has the model's first problem and its path in the data."""
    assert error_of(given_as(op=op, data=data), bound) == (field, why)


def test_what_is_stored_is_what_the_model_makes_of_it() -> None:
    """Values are coerced; defaults are not filled in, and fields that the model does not know stay."""
    data = {"name": "Kennedy", "unknown": [1], "runways": [{"length": "4423"}]}
    operation, attribute = bound.read(given_as(data=data))
    assert operation.data == {**data, "runways": [{"length": 4423}]}
    assert stored(attribute) == operation.data


def test_a_patch_is_not_checked_against_the_model() -> None:
    """A patch is only a part of a record; the writer checks the whole record."""
    bound.read(given_as(op="patch", data={"runways": None}))
    bound.read(given_as(op="delete", data=...))


def test_a_patched_record_is_checked_against_all_rules() -> None:
    """The merged record must fit the model, the size and the nesting."""
    assert bound.read_merged("airport", {"name": "x"}) == ({"name": "x"}, to_attribute({"name": "x"}))
    for data, field in (
        ({"a": 1}, "data.name"),
        ({"name": "x" * MAX_RECORD_BYTES}, "data"),
        ({**nested(32), "name": "x"}, "data" + ".a" * 31),
    ):
        with pytest.raises(FieldError) as caught:
            bound.read_merged("airport", data)
        assert caught.value.field == field


def test_strict_entities_refuse_entities_without_a_model() -> None:
    """Only a strict deployment refuses them, for every operation."""
    bound.read(given_as(entity="plane"))
    assert error_of(given_as(entity="plane"), strict) == ("entity", "'plane' is not bound to a model")
    assert error_of(given_as(entity="plane", op="delete", data=...), strict)[0] == "entity"
    strict.read(given_as(data={"name": "x"}))


def same(left: Any, right: Any) -> bool:
    """Return whether two JSON values are the same: text by code point, numbers by exact value, and true is not 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return same(Decimal(repr(left)), right)
    if isinstance(right, float):
        return same(left, Decimal(repr(right)))
    if isinstance(left, int | Decimal) and isinstance(right, int | Decimal):
        return isinstance(left, bool) == isinstance(right, bool) and left == right
    return type(left) is type(right) and bool(left == right)


def decimal_of(coefficient: int, exponent: int) -> Decimal:
    return Decimal((int(coefficient < 0), tuple(map(int, str(abs(coefficient)))), exponent))


whole = st.integers(-(10**38 - 1), 10**38 - 1)
fractions = st.builds(decimal_of, whole, st.integers(-130, 88))
texts = st.text() | st.sampled_from(["", "e\u0301", "é", "ﬁ", "😀👩‍🚀", "\x00\x1f\x7f\u2028", '"\\/', "\ufeff", "null"])
names = texts.filter(bool)
values = st.recursive(
    st.none() | st.booleans() | whole | fractions | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(names, values, max_size=5), texts)
@example({"a": Decimal("1.50"), "b": [True, 1, Decimal("1.0")], "c": ""}, "g")
def test_any_json_value_survives_exactly(data: dict[str, Any], group: str) -> None:
    """Any JSON value within the limits survives reading, writing as a line and decoding, exactly."""
    mapping = given_as(data=data, group=(group or "g")[:128])
    operation, attribute = validator.read(mapping)
    assert same(operation.data, data)
    assert same(stored(attribute), data)
    line = exactjson.dumps(operation)
    assert b"\n" not in line
    assert b"\n" not in attribute
    decoded = Validator.decode(line)
    assert same(decoded.data, data)
    assert (decoded.op, decoded.entity, decoded.key, decoded.group) == ("insert", "airport", "KJFK", mapping["group"])
    again, attribute_again = validator.read(line)
    assert same(again.data, data)
    assert attribute_again == attribute


def stored(attribute: bytes) -> Any:
    """Return the value that DynamoDB JSON stands for, or None if there is none."""
    return from_attribute(exactjson.loads(attribute)) if attribute else None


LARGE = Validator(entities=Entities(), max_record_bytes=2**22)


@pytest.mark.parametrize(("letters", "fits"), [(MAX_INLINE - 5, True), (MAX_INLINE - 4, False)])
def test_data_that_does_not_fit_an_item_is_not_marshalled(letters: int, fits: bool) -> None:
    """A record over the item limit is validated like any other; the writer stores its data in a blob."""
    source = given_as(data={"a": "x" * letters})
    for form in (source, exactjson.dumps(source), Operation(**source)):
        operation, attribute = LARGE.read(form)
        assert operation.data == source["data"]
        assert bool(attribute) is fits


def test_large_data_is_checked_against_all_rules() -> None:
    """Data that is too large to be marshalled must be exact too."""
    with pytest.raises(FieldError) as caught:
        LARGE.read(given_as(data={"a": "x" * MAX_INLINE, "b": [10**38 + 1]}))
    assert caught.value.field == "data.b[0]"


def test_many_small_numbers_are_measured_in_little_memory() -> None:
    """Marshalled numbers take a hundred times the memory of their JSON, so data is measured without marshalling it."""
    source = exactjson.dumps(given_as(data={"a": [1] * 500_000}))
    tracemalloc.start()
    try:
        assert LARGE.read(source)[1] == b""
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
