"""The documents name functions and files that exist. The integration test of the same name checks the order of the calls."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from tests.write_path import PAGE, ROOT, hops, named, resolve

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", named())
def test_the_page_names_existing_functions(name: str) -> None:
    """Each `file.py:Qualified.name` on the page is a function or a class that is defined in that file."""
    found = resolve(name)
    assert inspect.isfunction(found) or inspect.isclass(found)
    assert inspect.getsourcefile(inspect.unwrap(found)) == str(ROOT / name.partition(":")[0])


@pytest.mark.parametrize(
    "heading", ["A request of one lane", "Small requests side by side", "A request of several lanes"]
)
def test_the_hops_of_a_section_are_numbered_in_order(heading: str) -> None:
    """The rows count from 1, and each function has one row, so a number identifies a hop."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    assert numbers == list(range(1, len(hops(heading)) + 1))
    assert len(set(hops(heading))) == len(numbers) >= 6


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_existing_files(path: Path) -> None:
    """Each path in backticks that starts at the repository's root, and each relative link, leads to a file or directory."""
    text = path.read_text("utf-8")
    paths = re.findall(r"`((?:mdstore|tests|docs|workers|config|examples|benchmarks)/[\w./-]*\w/?)[`:]", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [one for one in paths if not (ROOT / one).exists()]
    missing += [one for one in links if not (path.parent / one).exists()]
    assert missing == []
