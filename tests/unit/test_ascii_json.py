"""JSON in ASCII: what any text of Python becomes, and that it comes back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdstore.queue.broker.ascii_json import Decoder, dumps, escaped
from mdstore.queue.broker.encoding import group_id

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
VALUES = st.recursive(
    ANY_TEXT | st.integers(-(2**53), 2**53) | st.none(), lambda inner: st.dictionaries(ANY_TEXT, inner)
)


class Named(msgspec.Struct):
    """A type with a text."""

    name: str
    number: int = 0


@given(VALUES)
def test_any_text_comes_back(value: Any) -> None:
    """As Python's own JSON reads it, which kombu uses, and as the checks read it."""
    text = dumps(value)
    assert text.isascii()
    assert json.loads(text) == json.loads(json.dumps(value))
    assert Decoder[Any]().decode(text) == json.loads(text)
    assert json.loads(escaped(json.dumps(value, ensure_ascii=False))) == json.loads(text)


def test_plain_text_is_written_as_before() -> None:
    """Compact, with times as text, and with what is no JSON as its caller says."""
    value = {"a": [1, "x/y"], "at": datetime(2026, 1, 2, tzinfo=UTC)}
    assert dumps(value) == '{"a":[1,"x/y"],"at":"2026-01-02T00:00:00Z"}'
    assert dumps({**value, "b": "\udcff"}) == '{"a":[1,"x/y"],"at":"2026-01-02T00:00:00Z","b":"\\udcff"}'
    assert dumps({"a": object, "b": "\udcff"}, enc_hook=lambda _: "\ud800") == r'{"a":"\ud800","b":"\udcff"}'


@pytest.mark.parametrize(
    "text", ['{"name": 7}', '{"name": "\\udcff", "number": "x"}', '{"name": "\\udcff"', '"\\ud800']
)
def test_what_is_wrong_is_said(text: str) -> None:
    """A wrong type and broken JSON are errors, whatever text is in it."""
    with pytest.raises(ValueError, match=r"Expected|malformed|delimiter|truncated|Invalid"):
        Decoder[Named](Named).decode(text)


def test_half_a_pair_is_read_into_a_type() -> None:
    """The type is checked as for any other text."""
    assert Decoder[Named](Named).decode('{"name": "a\\udcff", "number": 3}') == Named("a\udcff", 3)


@given(st.lists(ANY_TEXT.filter(bool), min_size=2, max_size=4, unique=True))
def test_groups_are_valid_stable_and_distinct(names: list[str]) -> None:
    """Whatever the task is called, SQS takes its group, and another name has another one."""
    groups = [group_id(name) for name in names]
    assert groups == [group_id(name) for name in names]
    assert len(set(groups)) == len(names)
    for group in groups:
        assert 1 <= len(group) <= 128
        assert all("!" <= character <= "~" for character in group)


def test_a_name_that_sqs_takes_is_its_own_group() -> None:
    """So that a queue keeps its groups; a long name keeps its beginning, for people."""
    assert group_id("shop.tasks.add") == "shop.tasks.add"
    assert group_id("x" * 128) == "x" * 128
    assert group_id("move a record").startswith("move-a-record-")
