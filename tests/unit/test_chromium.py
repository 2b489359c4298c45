"""How the browser tests get their browser."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.browser import chromium

PLAYWRIGHT = f"{sys.executable} -m playwright install"
APT = "apt-get -qq -o DPkg::Lock::Timeout=300"


@dataclass
class Machine:
    """A machine with nothing on PATH but an apt-get; its commands fail unless `works` has what they do."""

    directory: Path
    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def add(self, name: str, *, starts: bool = True) -> Path:
        """Put a program on PATH, or where Playwright's own would be; one that does not start ends with an error."""
        path = self.directory / name
        path.touch(mode=0o755)
        if starts:
            self.works[f"{path} --version"] = lambda: None
        return path

    def run(self, command: chromium.Command) -> bool:
        """Run a command of this machine."""
        text = " ".join(command)
        if not text.endswith("--version"):
            self.ran.append(text)
        if text not in self.works:
            return False
        self.works[text]()
        return True

    def provide(self, prefix: chromium.Command | None = ()) -> Path | None:
        """Provide a browser on this machine."""
        return chromium.provide(self.directory / "bundled", run=self.run, prefix=lambda: prefix, say=self.said.append)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = Machine(tmp_path)
    made.add("apt-get")
    return made


@pytest.mark.parametrize("name", chromium.NAMES)
def test_an_installed_browser_is_used_and_nothing_is_installed(machine: Machine, name: str) -> None:
    path = machine.add(name)

    assert machine.provide() == path
    assert machine.ran == []
    assert machine.said == [f"browser: {path}, already installed"]


def test_a_browser_that_does_not_start_is_passed_over(machine: Machine) -> None:
    """A script that stands for a browser counts as little as libraries that are missing."""
    machine.add("chromium-browser", starts=False)
    chrome = machine.add("google-chrome")

    assert machine.provide() == chrome


def test_playwrights_own_is_tried_first(machine: Machine) -> None:
    machine.works[f"{PLAYWRIGHT} --with-deps chromium"] = lambda: machine.add("bundled")

    assert machine.provide() == machine.directory / "bundled"
    assert machine.ran == [f"{PLAYWRIGHT} --with-deps chromium"]
    assert machine.said[-1].endswith(f"installed by {PLAYWRIGHT} --with-deps chromium")


@pytest.mark.parametrize("prefix", [[], ["sudo", "-n"]], ids=["root", "sudo"])
def test_debians_is_installed_where_playwrights_cannot_be(machine: Machine, prefix: list[str]) -> None:
    apt = " ".join([*prefix, APT])
    machine.works[f"{apt} update"] = lambda: None
    machine.works[f"{apt} install --yes --no-install-recommends chromium"] = lambda: machine.add("chromium")

    assert machine.provide(prefix) == machine.directory / "chromium"
    assert [command.partition(" -o")[0] for command in machine.ran[1:]] == [" ".join([*prefix, "apt-get -qq"])] * 2


def test_debians_is_installed_where_playwrights_does_not_start(machine: Machine) -> None:
    machine.works[f"{PLAYWRIGHT} --with-deps chromium"] = lambda: machine.add("bundled", starts=False)
    machine.works[f"{APT} update"] = lambda: None
    machine.works[f"{APT} install --yes --no-install-recommends chromium"] = lambda: machine.add("chromium")

    assert machine.provide() == machine.directory / "chromium"


def test_without_root_nothing_asks_for_a_password(machine: Machine) -> None:
    assert machine.provide(None) is None
    assert machine.ran == [f"{PLAYWRIGHT} chromium"]


def test_where_every_way_fails_one_message_says_what_to_do(machine: Machine) -> None:
    assert machine.provide() is None
    assert machine.ran == [f"{PLAYWRIGHT} --with-deps chromium", f"{APT} update"]
    assert machine.said[-1] == chromium.MISSING
    assert "apt-get update && apt-get install --yes chromium" in chromium.MISSING


def test_a_machine_without_apt_is_left_alone(machine: Machine) -> None:
    (machine.directory / "apt-get").unlink()

    assert machine.provide() is None
    assert machine.ran == [f"{PLAYWRIGHT} --with-deps chromium"]


def test_root_needs_no_sudo_and_others_need_one_that_does_not_ask(machine: Machine) -> None:
    assert chromium.root_prefix(0, machine.run) == []
    assert chromium.root_prefix(1000, machine.run) is None
    machine.add("sudo")
    assert chromium.root_prefix(1000, machine.run) is None
    machine.works["sudo -n true"] = lambda: None
    assert chromium.root_prefix(1000, machine.run) == ["sudo", "-n"]


def test_a_command_that_cannot_be_run_has_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert chromium.run_command([sys.executable, "-c", ""])
    assert not chromium.run_command([sys.executable, "-c", "raise SystemExit(3)"])
    assert not chromium.run_command([str(tmp_path / "nothing")])
    assert "browser: " in capfd.readouterr().out
