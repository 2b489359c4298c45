"""Each line of `docs/security.md` about a right names tests, and they exist."""

from __future__ import annotations

import re

import pytest

from tests.write_path import ROOT

ROWS = re.findall(r"^\| (?!right|---)(.+) \|$", (ROOT / "docs/security.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(" | ")[0])
def test_a_right_has_tests(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py):(test_\w+)`", row)
    assert named
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text("utf-8")


def test_the_page_has_rows() -> None:
    assert len(ROWS) >= 9
