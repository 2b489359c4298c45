"""The wheel without extras, in a virtual environment of its own: it runs, has types, and misses only what extras bring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[2]
#: Extras and the modules that need them; a package stands for all that is in it.
MODULES_OF_EXTRAS = {"api": ["mdstore.api"]}
#: Commands that need an extra; without it each says how to install it.
COMMANDS_OF_EXTRAS = {"api": "api", "flower": "flower", "up": "local"}
#: Imports each module that is named, and prints what is missing for it, None where nothing is.
IMPORT_EACH = """
import importlib, json, sys
missing = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        missing[name] = None
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps(missing))
"""


@dataclass(frozen=True)
class Installed:
    """A virtual environment for a wheel, and an empty directory that its programs run in."""

    wheel: Path
    environment: Path
    directory: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; it sees no setting of this process, and no code but what is installed."""
        return subprocess.run(
            [self.environment / "bin" / program, *arguments],
            cwd=self.directory, env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def install(self, requirement: str) -> None:
        """Install a requirement that is not there yet, of the versions that are tested."""
        # A file is compiled when it is imported: to compile all of boto3 beforehand would take longer than the tests.
        options = ["--no-compile", "--constraint", str(ROOT / "constraints.txt")]
        pip("--python", str(self.environment / "bin" / "python"), "install", *options, requirement)

    def with_extra(self, extra: str, directory: Path) -> Installed:
        """Make another environment that sees this one's packages, and has an extra besides."""
        made = new_environment(self.wheel, directory)
        (made.packages / "without_extra.pth").write_text(str(self.packages))
        made.install(f"{self.wheel}[{extra}]")
        return made

    @property
    def packages(self) -> Path:
        """The directory that packages are installed in."""
        (found,) = self.environment.glob("lib/python*/site-packages")
        return found

    @cached_property
    def files(self) -> list[str]:
        """The names of the files in the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.namelist()

    def missing(self) -> dict[str, str | None]:
        """By the name of each module in the wheel, what is missing for its import, None where nothing is."""
        paths = [PurePath(name).with_suffix("") for name in self.files if name.endswith(".py")]
        names = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)
        ran = self.run("python", "-W", "error", "-c", IMPORT_EACH, *names)
        assert ran.returncode == 0, ran.stderr
        found: dict[str, str | None] = json.loads(ran.stdout)
        return found


def pip(*arguments: str) -> None:
    """Run this environment's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr


def extra_of(module: str) -> str | None:
    """The extra that a module needs, None for most."""
    return next(
        (
            extra
            for extra, packages in MODULES_OF_EXTRAS.items()
            if any(f"{module}.".startswith(f"{package}.") for package in packages)
        ),
        None,
    )


def new_environment(wheel: Path, directory: Path) -> Installed:
    """Make an environment with nothing in it; its packages come from this one's pip."""
    made = Installed(wheel, directory / "environment", directory / "empty")
    made.directory.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.environment], timeout=60, check=True)
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An environment with the wheel and what it requires; nothing else that this machine has is seen in it."""
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT))
    (wheel,) = directory.iterdir()
    made = new_environment(wheel, directory)
    made.install(str(wheel))
    return made


def test_the_wheel_has_types_and_nothing_but_the_package(installed: Installed) -> None:
    """`py.typed` tells type checkers that the annotations count."""
    assert "mdstore/py.typed" in installed.files
    assert {name.partition("/")[0].partition("-")[0] for name in installed.files} == {"mdstore"}
    assert len([name for name in installed.files if name.endswith(".py")]) == len(list(ROOT.glob("mdstore/**/*.py")))


def test_the_command_runs_without_extras(installed: Installed) -> None:
    """`mdstore --help` names the commands, and `mdstore config` prints the defaults."""
    helped, config = installed.run("mdstore", "--help"), installed.run("mdstore", "config", "--json")

    assert (helped.returncode, helped.stderr) == (0, "")
    assert {"load", "get", "worker", *COMMANDS_OF_EXTRAS} <= set(helped.stdout.split())
    assert (config.returncode, config.stderr) == (0, "")
    assert '"endpoint_url"' in config.stdout


@pytest.mark.parametrize(("command", "extra"), COMMANDS_OF_EXTRAS.items())
def test_a_command_that_needs_an_extra_names_it(installed: Installed, command: str, extra: str) -> None:
    """It ends with 1, and says what to install."""
    ran = installed.run("mdstore", command)

    assert ran.returncode == 1
    assert f'pip install "mdstore[{extra}]"' in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


def test_every_module_that_needs_no_extra_imports(installed: Installed) -> None:
    """The modules that miss something are exactly those that are known to need an extra."""
    missing = installed.missing()

    assert {name for name, lacks in missing.items() if lacks} == {name for name in missing if extra_of(name)}


@pytest.mark.parametrize("extra", MODULES_OF_EXTRAS)
def test_a_module_that_needs_an_extra_needs_nothing_else(installed: Installed, extra: str, tmp_path: Path) -> None:
    """It imports as soon as its extra is installed."""
    missing = installed.with_extra(extra, tmp_path).missing()

    assert {name: lacks for name, lacks in missing.items() if extra_of(name) in {extra, None} and lacks} == {}
