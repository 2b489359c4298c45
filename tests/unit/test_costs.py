"""The cost of decoding is bounded before anything is decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdstore import exactjson
from mdstore.errors import InvalidOperations
from mdstore.model import State
from mdstore.settings import Settings
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.validation import FieldError, Validator
from tests.unit.bench import Bench
from tests.unit.test_ingestor import OPERATION
from tests.unit.test_ingestor import Bench as IngestorBench

PADDING = {"padding": " " * 2**14}  # shorter text is not checked
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def counted(value: Any) -> int:
    """Return an upper limit of the separators of a value's JSON: two for each value and each name."""
    if isinstance(value, dict):
        return 2 + sum(1 + counted(item) for item in value.values())
    if isinstance(value, list):
        return 2 + sum(1 + counted(item) for item in value)
    return 1


@given(value=_json)
def test_json_within_the_limits_passes(value: Any) -> None:
    """Whatever texts hold - digits, commas, quotes, backslashes - does not count."""
    for ensure_ascii in (False, True):
        text = json.dumps([value, PADDING, "1" * 5_000, '\\",' * 5_000], ensure_ascii=ensure_ascii)
        exactjson.check_cost(text.encode(errors="surrogatepass"), most_values=counted([value, PADDING, "", ""]))


@given(value=_json)
def test_more_values_than_allowed_are_found(value: Any) -> None:
    """However they are mixed with texts, a thousand values are more than 999."""
    text = json.dumps([value, PADDING, '[{,\\"' * 9, [0] * 1_000]).encode()
    with pytest.raises(ValueError, match="more than 999 values"):
        exactjson.check_cost(text, most_values=999)


@pytest.mark.parametrize("number", ["1" * 1_001, "0." + "1" * 1_001, "-" + "0" * 1_001, "1e" + "1" * 1_001])
@given(before=st.text())
def test_a_long_number_is_found(number: str, before: str) -> None:
    """It is found after any text, in an integer, a fraction or an exponent."""
    text = json.dumps([PADDING, before]).encode()[:-1] + b"," + number.encode() + b"]"
    with pytest.raises(ValueError, match="a number of more than 1000 digits"):
        exactjson.check_cost(text, most_values=2**20)


def test_a_number_of_a_thousand_digits_is_decoded() -> None:
    """They are converted, and refused for what they are."""
    line = json.dumps({"op": "insert", "entity": "e", "key": "k", "data": {**PADDING, "n": int("9" * 1_000)}}).encode()
    with pytest.raises(FieldError, match=r"data\.n"):
        Bench().validator.read(line)


def test_the_limit_of_values_is_a_setting() -> None:
    """A record of one value too many is refused, whichever way its line takes."""
    validator = Validator(entities=Bench().validator.entities, max_record_bytes=2**20, max_record_values=5_000)
    line = json.dumps({"op": "insert", "entity": "e", "key": "k", "data": {"a": [0] * 5_000, **PADDING}})
    for given_line in (line, line.encode()):
        with pytest.raises(FieldError, match="operation: more than 5000 values"):
            validator.read(given_line)


def test_a_long_line_that_is_no_json_may_belong_to_any_group() -> None:
    """A line that names very many groups refuses all of them, without listing them."""
    settings = Settings()
    builder = PayloadBuilder(validator=Bench().validator, settings=settings)
    builder.add({"op": "insert", "entity": "e", "key": "k", "data": {}, "group": "g"})
    builder.add(b",".join(b'"group":"%d"' % n for n in range(1_001)))
    assert [found.index for found in builder.refused_groups()] == [0]


def invalid(count: int) -> list[dict[str, Any]]:
    return [{}] * count


def test_very_many_invalid_operations_are_not_all_read() -> None:
    """After a thousand of them the rest of the request is not read, and the count says that there may be more."""
    read = 0

    def operations() -> Any:
        nonlocal read
        for operation in invalid(5_000):
            read += 1
            yield operation

    with pytest.raises(InvalidOperations, match="at least 1000 invalid operations") as caught:
        IngestorBench().ingestor.accept(operations(), publish=print, request_id="r")
    assert (read, caught.value.count, len(caught.value.problems)) == (1_000, 1_000, 100)


def test_an_accepted_request_with_very_many_invalid_operations_is_known_again() -> None:
    """A repeat is read to its end, even by a caller that would refuse the request now; one that is longer is not."""
    bench = IngestorBench()
    assert bench.submit(OPERATION, *invalid(1_500), on_invalid="refuse")
    bench.ledger.states["r"] = State.COMPLETED, 0.0
    assert not bench.submit(OPERATION, *invalid(1_500))
    with pytest.raises(InvalidOperations) as caught:
        bench.submit(OPERATION, *invalid(9_000))
    assert caught.value.count == 1_501
