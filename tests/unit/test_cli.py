"""The command line's error messages and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mdstore import cli
from mdstore.local.emulator import free_port
from mdstore.store.records import Records


def run(*arguments: str, **environ: str) -> tuple[int, str]:
    """Run a command against a port where nothing listens, and return its exit code and standard error."""
    environ = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", **environ}
    ran = CliRunner().invoke(cli.main, arguments, env=environ)
    return ran.exit_code, ran.stderr


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the console write to the stream that the runner reads."""
    from rich.console import Console  # noqa: PLC0415

    for module in (cli.console, cli.load, cli.records):
        monkeypatch.setattr(module, "messages", Console(stderr=True, highlight=False, soft_wrap=True))


@pytest.mark.usefixtures("stderr")
def test_a_refused_connection_says_what_to_start() -> None:
    """The error has a hint, and the exit code is 1."""
    code, output = run("get", "airport", "KJFK")
    assert code == 1
    assert "is `mdstore up` (make up) running?" in output


@pytest.mark.usefixtures("stderr")
def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C, no command prints a traceback or one of the package's errors."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Records, "get", interrupt)
    assert run("get", "airport", "KJFK") == (130, "interrupted\n")


@pytest.mark.usefixtures("stderr")
def test_an_error_in_a_csv_file_names_file_and_line(tmp_path: Path) -> None:
    """A value longer than any record may be is such an error."""
    path = tmp_path / "rows.csv"
    path.write_text("code,name\nDE,Deutschland\nFR," + "x" * (2**24 + 1) + "\n", encoding="utf-8")
    code, output = run("load", str(path), "--entity", "country", "--key", "code")
    assert code == 1
    assert f"file: expected CSV (a row of more than 16777216 characters), got '{path}, line 3'" in output


@pytest.mark.usefixtures("stderr")
@pytest.mark.parametrize("profile", ["local", "aws"])
def test_an_unknown_aws_profile(profile: str) -> None:
    """On AWS it is an error that names the setting; the local profile does not look it up."""
    code, output = run(
        "get",
        "airport",
        "KJFK",
        MDSTORE_PROFILE=profile,
        MDSTORE_BUCKET="b",
        AWS_REGION="eu-central-1",
        AWS_PROFILE="unknown",
    )
    assert code == 1
    if profile == "aws":
        assert "setting aws_profile='unknown': expected the name of a profile" in output
    else:
        assert "Failed to connect to 127.0.0.1" in output
