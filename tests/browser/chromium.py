"""The browser of the browser tests: an installed chromium or Chrome, or else one that this module installs.

`python -m tests.browser.chromium` is what `make test` calls before it runs the browser tests. It installs a browser only where
none is found, says which way it took, and ends with 0 in any case: without a browser it is the tests that fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

#: What browsers are called that Playwright can drive, in the order of preference.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "The browser tests need chromium or Google Chrome, and none could be installed."
    " Put one of these on PATH and repeat: " + ", ".join(NAMES) + "."
    " On Debian, run as root: apt-get update && apt-get install --yes chromium"
)
_INSTALLED_WITHIN = 900  # seconds, on a slow line

Command = Sequence[str]
Run = Callable[[Command], bool]


def find(bundled: Path, run: Run) -> Path | None:
    """Return the first browser that starts: of those on PATH, then `bundled`, the place of Playwright's own.

    Being there is not enough: Ubuntu's chromium-browser is a script that only says how to install the real one, and
    Playwright's own does not start where libraries of the system are missing.
    """
    on_path = (shutil.which(name) for name in NAMES)
    candidates = [*filter(None, on_path), *([str(bundled)] if bundled.exists() else [])]
    return next((Path(candidate) for candidate in candidates if run([candidate, "--version"])), None)


def ways(prefix: Command | None) -> Iterator[list[Command]]:
    """Yield the ways to install a browser, each as commands; `prefix` makes a command root's, None: this user cannot be."""
    playwright = [sys.executable, "-m", "playwright", "install"]
    if prefix is None:
        yield [[*playwright, "chromium"]]  # with the system's libraries it would ask for root's password
        return
    yield [[*playwright, "--with-deps", "chromium"]]
    if shutil.which("apt-get"):
        # Another apt-get, such as the daily one, holds a lock.
        apt = [*prefix, "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        yield [[*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", "chromium"]]


def root_prefix(user: int, run: Run) -> Command | None:
    """Return what makes a command root's: nothing for root itself, sudo where it asks for no password, else None."""
    if user == 0:
        return []
    return ["sudo", "-n"] if shutil.which("sudo") and run(["sudo", "-n", "true"]) else None


def provide(
    bundled: Path, *, run: Run, prefix: Callable[[], Command | None], say: Callable[[str], None]
) -> Path | None:
    """Find a browser, or install one in the first way that brings one that starts."""
    found = find(bundled, run)
    if found is not None:
        say(f"browser: {found}, already installed")
        return found
    for commands in ways(prefix()):
        text = " && ".join(" ".join(command) for command in commands)
        say(f"browser: none found, trying {text}")
        done = all(run(command) for command in commands)
        found = find(bundled, run) if done else None
        if found is not None:
            say(f"browser: {found}, installed by {text}")
            return found
    say(MISSING)
    return None


def bundled_path() -> Path:
    """Return where Playwright keeps its own chromium, whether it is there or not."""
    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path)


def run_command(command: Command) -> bool:
    """Run a command, whose output goes to the terminal; returns whether it ended well and in time."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, timeout=_INSTALLED_WITHIN, check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"browser: {error}", flush=True)
        return False
    return done.returncode == 0


def main() -> None:
    """Provide a browser, and say how."""
    provide(
        bundled_path(),
        run=run_command,
        prefix=lambda: root_prefix(os.geteuid(), run_command),
        say=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    main()
