"""Output, progress bars, error handling and exit codes for all commands."""

from __future__ import annotations

import os
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
from mdstore.cli.missing import hint
from mdstore.errors import MdstoreError, NotFound, Unavailable
from mdstore.model import Outcome
from mdstore.store.operations import OPERATIONS

P = ParamSpec("P")
REFUSED, NOT_FOUND, UNVERIFIED, NOT_FINISHED, INTERRUPTED = 3, 4, 5, 6, 130

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
        except BrokenPipeError:  # the reader closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at exit
            sys.exit(0)
        except (MdstoreError, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            advice = hint(error) if isinstance(error, MdstoreError) else ""
            if kwargs.get("as_json"):
                emit({"error": type(error).__name__, "message": f"{error} {advice}".strip()})
            else:
                messages.print(f"[bold red]error:[/] {escaped(error)}")
                if advice:
                    messages.print(escaped(advice))
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


def summary_line(summary: dict[str, Any]) -> str:
    """Return a request's state and counts as one line of text."""
    by_op = ", ".join(f"{count:,} {_past_tense(op)}" for op, count in summary["applied_by_op"].items())
    by_reason = ", ".join(f"{count:,} {reason}" for reason, count in summary["refused_by_reason"].items())
    return (
        f"request {summary['request_id']} {summary['state']}: {summary['operations']:,} operations,"
        f" {summary['applied']:,} applied{f' ({by_op})' if by_op else ''},"
        f" {summary['refused']:,} refused{f' ({by_reason})' if by_reason else ''}, {summary['failed']:,} failed"
    )


def _past_tense(op: str) -> str:
    """Return `inserted` for `insert`. An op that this release does not know is returned unchanged."""
    return next((spec.past for name, spec in OPERATIONS.items() if name == op), op)


def outcome_line(outcome: Outcome, *, place: str = "") -> str:
    """Return an outcome as one line of text, at its `place` in a file or at its index in the request."""
    what = f"{outcome.op or '?'} {outcome.entity or '?'}/{outcome.key or '?'}"
    reason = f" {outcome.reason}" if outcome.reason else ""
    return f"{place or f'operation {outcome.index}'}: {what}: {outcome.outcome}{reason}" + (
        f" ({outcome.detail})" if outcome.detail else ""
    )
