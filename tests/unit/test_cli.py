"""The command line's own manners: what it says and which code it ends with when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mdstore import cli
from mdstore.local.emulator import free_port
from mdstore.store.records import Records


def run(*arguments: str, **environ: str) -> tuple[int, str]:
    """Exit code and standard error of a command against a port where nothing listens."""
    environ = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", **environ}
    ran = CliRunner().invoke(cli.main, arguments, env=environ)
    return ran.exit_code, ran.stderr


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """The console writes to the stream that the runner reads."""
    from rich.console import Console  # noqa: PLC0415

    for module in (cli.console, cli.load, cli.records):
        monkeypatch.setattr(module, "messages", Console(stderr=True, highlight=False, soft_wrap=True))


@pytest.mark.usefixtures("stderr")
def test_where_nothing_answers_the_error_says_what_to_start() -> None:
    """A connection that is refused comes with the hint, and with code 1."""
    code, said = run("get", "airport", "KJFK")
    assert code == 1
    assert "is `mdstore up` (make up) running?" in said


@pytest.mark.usefixtures("stderr")
def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in any command is no error of the package and no traceback."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Records, "get", interrupt)
    assert run("get", "airport", "KJFK") == (130, "interrupted\n")


@pytest.mark.usefixtures("stderr")
def test_a_csv_file_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    """A value longer than any record may be is an error that names file and line."""
    path = tmp_path / "rows.csv"
    path.write_text("code,name\nDE,Deutschland\nFR," + "x" * (2**24 + 1) + "\n", encoding="utf-8")
    code, said = run("load", str(path), "--entity", "country", "--key", "code")
    assert code == 1
    assert f"file: expected CSV (field larger than field limit (16777216)), got '{path}, line 3'" in said


@pytest.mark.usefixtures("stderr")
@pytest.mark.parametrize("profile", ["local", "aws"])
def test_an_aws_profile_that_is_not_there(profile: str) -> None:
    """On AWS it is an error that names the setting; the local profile does not even look."""
    code, said = run(
        "get",
        "airport",
        "KJFK",
        MDSTORE_PROFILE=profile,
        MDSTORE_BUCKET="b",
        AWS_REGION="eu-central-1",
        AWS_PROFILE="nobody",
    )
    assert code == 1
    if profile == "aws":
        assert "setting aws_profile='nobody': expected the name of a profile" in said
    else:
        assert "Failed to connect to 127.0.0.1" in said
