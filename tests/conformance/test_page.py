"""The page about this suite matches the suite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.conftest import STALE
from tests.conformance.differences import DIFFERENCES

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_page_lists_exactly_the_differences() -> None:
    """The page has one row per difference, in the same order, with the same emulator, test, behaviour and AWS page."""
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| (.+) \| <(\S+)> \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == [(one.emulator, one.name, one.instead, one.right) for one in DIFFERENCES]


def test_every_difference_belongs_to_a_test(request: pytest.FixtureRequest) -> None:
    """Each difference names an existing test and existing cases, and none is listed twice."""
    assert request.config.stash[STALE] == []
    assert len(set(DIFFERENCES)) == len(DIFFERENCES)
