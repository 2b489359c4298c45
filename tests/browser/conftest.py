"""A real browser: chromium or Chrome, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser import chromium


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of this directory's tests."""
    parser.getgroup("browser").addoption("--pictures", type=Path, help="directory to put the tests' screenshots in")


@pytest.fixture(scope="module")  # while Playwright runs, no other test of this process can run an event loop
def browser() -> Iterator[Browser]:
    """A headless chromium. Where there is none, `make test` could not install one: the tests fail and say what to do."""
    with sync_playwright() as playwright:
        path = chromium.find(Path(playwright.chromium.executable_path), chromium.run_command)
        if path is None:
            pytest.fail(chromium.MISSING, pytrace=False)
        # Its sandbox needs a user that is not root, which CI is; the pages are this project's own.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def pictures(pytestconfig: pytest.Config) -> Path | None:
    """Return the directory for screenshots, or None if none are wanted."""
    directory: Path | None = pytestconfig.getoption("--pictures", default=None)
    return directory
