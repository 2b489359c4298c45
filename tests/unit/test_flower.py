"""`mdstore flower` before it serves: what it refuses, and what its errors say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdstore.errors import ConfigurationError
from mdstore.queue.control.flower import run
from mdstore.settings import load_settings


def flower(*arguments: str, code: str = "") -> str:
    """Run the command, which exits with 1, and return its error output."""
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


@pytest.mark.parametrize("address", ["0.0.0.0", ""])  # noqa: S104  the command refuses it
def test_a_reachable_address_needs_a_password(address: str) -> None:
    """Without one, Flower would show every task's arguments to the network. The error says how to set one."""
    output = flower(f"--address={address}")
    assert "--address" in output
    assert "FLOWER_BASIC_AUTH=user:password" in output


def test_a_missing_flower_says_how_to_install_it() -> None:
    """Flower is an optional extra of the package."""
    assert 'pip install "mdstore[flower]"' in flower(code="sys.modules['flower'] = None; ")


@pytest.mark.parametrize("setting", ["events", "remote_control"])
def test_flower_without_events_or_remote_control_is_refused(setting: str) -> None:
    """Its pages would be empty."""
    with pytest.raises(ConfigurationError, match=setting):
        run(load_settings({}, **{setting: False}).settings, [])
