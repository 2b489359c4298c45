"""The page about this suite tells the truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.conftest import STALE
from tests.conformance.differences import DIFFERENCES

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_page_lists_exactly_the_differences() -> None:
    """One row each, in the same order: emulator, test, what it does instead, and where AWS says what is right."""
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| (.+) \| <(\S+)> \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == [(one.emulator, one.name, one.instead, one.right) for one in DIFFERENCES]


def test_every_difference_is_some_test_s(request: pytest.FixtureRequest) -> None:
    """A test or a case that was renamed takes its row along."""
    assert request.config.stash[STALE] == []
    assert len(set(DIFFERENCES)) == len(DIFFERENCES)
