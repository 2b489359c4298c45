"""A real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of this directory's tests."""
    parser.getgroup("browser").addoption("--pictures", type=Path, help="directory to put the tests' screenshots in")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless chromium. A missing one fails the test, with the command that installs it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail(
            "browser tests need chromium: apt-get install --yes --no-install-recommends chromium", pytrace=False
        )
    with sync_playwright() as playwright:
        # Its sandbox needs a user that is not root, which CI is; the pages are this project's own.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def pictures(pytestconfig: pytest.Config) -> Path | None:
    """Return the directory for screenshots, or None if none are wanted."""
    directory: Path | None = pytestconfig.getoption("--pictures", default=None)
    return directory
