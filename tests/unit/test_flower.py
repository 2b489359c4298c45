"""`mdstore flower` before it serves: what it refuses, and what it says then."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdstore.errors import ConfigurationError
from mdstore.queue.control.flower import run
from mdstore.settings import load_settings


def flower(*arguments: str, code: str = "") -> str:
    """What the command says when it ends with 1."""
    program = (
        f"import sys; {code}sys.argv = ['mdstore', 'flower', *{arguments!r}]; from mdstore.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("address", ["0.0.0.0", ""])  # noqa: S104  refused is what it is
def test_an_address_that_others_reach_needs_a_password(address: str) -> None:
    """Without one Flower would show every task's arguments to the network; how to give one is said."""
    said = flower(f"--address={address}")
    assert "--address" in said
    assert "FLOWER_BASIC_AUTH=user:password" in said


def test_a_missing_flower_names_the_command_that_installs_it() -> None:
    """Flower is an extra."""
    assert 'pip install "mdstore[flower]"' in flower(code="sys.modules['flower'] = None; ")


@pytest.mark.parametrize("setting", ["events", "remote_control"])
def test_flower_without_events_or_remote_control_is_refused(setting: str) -> None:
    """It would be an empty page."""
    with pytest.raises(ConfigurationError, match=setting):
        run(load_settings({}, **{setting: False}).settings, [])
