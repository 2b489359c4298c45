"""Output, progress bars, error handling and exit codes for all commands."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mdstore import exactjson
from mdstore.aws.http import NO_CONNECTION
from mdstore.errors import MdstoreError, NotFound, Unavailable

P = ParamSpec("P")
REFUSED, NOT_FOUND, UNVERIFIED, INTERRUPTED = 3, 4, 5, 130

messages = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)


def emit(value: Any) -> None:
    """Print `value` as one line of JSON."""
    click.echo(exactjson.dumps(value).decode())


def json_option(command: Callable[P, None]) -> Callable[P, None]:
    """Add `--json` to a command, and turn this package's errors into a message and exit code 1, or 4 for `NotFound`."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (MdstoreError, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            if kwargs.get("as_json"):
                emit({"error": type(error).__name__, "message": str(error)})
            else:
                messages.print(f"[bold red]error:[/] {escaped(error)}")
                if isinstance(error, Unavailable) and error.code in ("EndpointConnectionError", NO_CONNECTION):
                    messages.print("Nothing answers there. With the profile local: is `mdstore up` (make up) running?")
            sys.exit(NOT_FOUND if isinstance(error, NotFound) else 1)
        except KeyboardInterrupt:
            messages.print("interrupted")
            sys.exit(INTERRUPTED)

    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(run)


def escaped(value: object) -> str:
    """Return `value` as text in which rich finds no markup."""
    return str(value).replace("[", r"\[")


def progress_bar(*, hidden: bool) -> Progress:
    """Create a progress bar on standard error."""
    columns = (
        TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=messages, disable=hidden)
