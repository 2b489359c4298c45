"""The command load: each file becomes one request."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, get_args

import click
from rich.progress import Progress

from mdstore.cli.console import (
    INTERRUPTED,
    NOT_FINISHED,
    REFUSED,
    emit,
    escaped,
    json_option,
    messages,
    outcome_line,
    progress_bar,
    results,
    summary_line,
)
from mdstore.client import Client
from mdstore.errors import DeploymentBroken, InvalidRequest, Unavailable
from mdstore.files import FIELDS, OperationFile, check_readable, read_operations
from mdstore.files.csv_file import Dialect
from mdstore.model import FINAL_STATES, State
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.operations import OPERATIONS, WRITING_OPS, Effect

_NO_WORKER_AFTER = 10.0  # seconds in the state `accepted`, after which a hint is printed


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--request-id", help="Idempotency key: repeating it with the same content changes nothing. Allowed with one file."
)
@click.option("--source", default="default", show_default=True, help="Source (tenant) that sends the request.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the final state.")
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds to wait at most; then the exit code is 6.")
@click.option("--entity", help="Entity of the rows of a CSV or Parquet file, or of JSON records.")
@click.option("--key", "key_column", help="Column or field with the keys of these rows or records.")
@click.option(
    "--op",
    type=click.Choice(WRITING_OPS),
    default="upsert",
    show_default=True,
    help="Operation for each row, and for each record of an export. upsert and update replace a record whole: fields that the"
    " file lacks are removed. patch keeps them.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="FIELD[=COLUMN]",
    help=f"Take a field of the operation ({', '.join(FIELDS)}) from a column; without it, the column is data. Repeatable.",
)
@click.option(
    "--newest-wins",
    is_flag=True,
    help="Let the highest `sequence` of each key win; inserts and updates become upserts.",
)
@click.option(
    "--csv-dialect",
    type=click.Choice(get_args(Dialect)),
    default="standard",
    show_default=True,
    help=r'standard: RFC 4180, where "" is a quote within quotes. backslash: a backslash takes the next character as it is.',
)
@json_option
def load(
    files: tuple[str, ...],
    request_id: str | None,
    source: str,
    wait: bool,
    timeout: float,
    entity: str | None,
    key_column: str | None,
    op: Any,
    columns: tuple[str, ...],
    newest_wins: bool,
    csv_dialect: Any,
    as_json: bool,
) -> None:
    """Load files; each becomes one request. Invalid lines are refused, and the others are applied.

    A .jsonl file holds operations, or records that `mdstore export` wrote. With --entity and --key, each row of a .csv or
    .parquet file and each object of a .jsonl file is a record. A file that is empty, damaged or not of its format sends
    nothing.
    """
    if request_id is not None and (len(files) > 1 or not request_id):
        raise InvalidRequest(field="--request-id", value=request_id, expected="one id for one file")
    fields = _fields(columns)
    client = Client()
    inputs = [
        read_operations(
            file,
            entity=entity,
            key=key_column,
            op=op,
            fields=fields,
            dialect=csv_dialect,
            settings=client.settings,
        )
        for file in files
    ]
    check_readable(inputs)
    models = client.store.entities.bound
    if not as_json:
        _print_checks(models, inputs, op)
    summaries: list[dict[str, Any]] = []
    for file in inputs:
        name = request_id or f"load-{uuid.uuid4()}"
        options = {"request_id": name, "source": source, "newest_wins": newest_wins}
        with progress_bar(hidden=as_json) as bar:
            summary = _load_one(client, bar, file, options, timeout if wait else None)
        summaries.append({**summary, "models": models})
        if not as_json:
            _print_load(client, file, summary, waited=wait)
        if "error" in summary:  # the next file may depend on this one
            break
    if as_json:
        emit(summaries[0] if len(inputs) == 1 else summaries)
    elif len(summaries) < len(inputs):
        messages.print(f"not sent: {', '.join(file.path for file in inputs[len(summaries) :])}", markup=False)
    codes = {_exit_code(summary, waited=wait) for summary in summaries}
    sys.exit(1 if 1 in codes else max(codes))


def _fields(columns: tuple[str, ...]) -> dict[str, str]:
    """Return the column of each field that `--column` names."""
    fields: dict[str, str] = {}
    for given in columns:
        name, _, column = given.partition("=")
        if name in fields:
            raise InvalidRequest(field="--column", value=given, expected=f"one column for {name}")
        fields[name] = column or name
    return fields


def _print_checks(models: list[str], files: list[OperationFile], op: Any) -> None:
    """Print what the data is checked against, and what may be unexpected about the files."""
    if models:
        messages.print(f"data is checked against the models of: {', '.join(models)}", markup=False)
    else:
        messages.print("no entity has a model, so data is not checked (the setting entities names the models' modules)")
    for file in files:
        for name in file.unused_fields():
            messages.print(f"{file.path}: the column {name} is data; --column {name} takes it as a field", markup=False)
    if OPERATIONS[op].effect is Effect.SET and op != "insert" and any(file.rows for file in files):
        messages.print(f"{op} replaces records whole: fields that a file lacks are removed (--op patch keeps them)")


def _load_one(
    client: Client, bar: Progress, file: OperationFile, options: dict[str, Any], timeout: float | None
) -> dict[str, Any]:
    task = bar.add_task("reading", total=None)
    submission = client.submit(_counted(file, bar, task), on_invalid="refuse", **options)
    request_id = submission.request_id
    bar.update(task, description="applying", total=submission.operations, completed=0)
    if submission.new:
        bar.console.print(f"request {request_id} accepted")
    hint = _no_worker_hint()

    def show(request: RequestStatus) -> None:
        bar.update(task, completed=request.counts.total)
        hint(request)

    known = {"new": submission.new, "sent": submission.sent}
    try:
        request = submission.status() if timeout is None else _wait(client, request_id, timeout, show)
    except KeyboardInterrupt:
        bar.stop()
        messages.print(f"the request continues; to see its progress: mdstore status {request_id}")
        sys.exit(INTERRUPTED)
    except (Unavailable, DeploymentBroken) as error:
        message = f"the request was accepted and continues, but its state cannot be read: {error}"
        return {"request_id": request_id, **known, "error": type(error).__name__, "message": message}
    return {**request.summary(), **known}


def _wait(client: Client, request_id: str, timeout: float, progress: Callable[[RequestStatus], None]) -> RequestStatus:
    """Wait until the request's state is final, and return its status; after `timeout` seconds, whatever its state is."""
    try:
        return client.wait(request_id, timeout=timeout, progress=progress)
    except Unavailable as error:
        if error.code != "Timeout":
            raise
        return client.status(request_id)


def _no_worker_hint(clock: Callable[[], float] = time.monotonic) -> Callable[[RequestStatus], None]:
    """Return a function that says once, after some seconds, that no worker has started a request."""
    deadline = clock() + _NO_WORKER_AFTER

    def hint(request: RequestStatus) -> None:
        nonlocal deadline
        if request.state is State.ACCEPTED and clock() >= deadline:
            deadline = float("inf")
            messages.print(
                f"no worker has started the request within {_NO_WORKER_AFTER:.0f} s: is one running?"
                " `mdstore worker` starts one. The request is durable and waits."
            )

    return hint


def _counted(file: OperationFile, bar: Progress, task: Any) -> Iterator[Any]:
    for count, operation in enumerate(file, 1):
        if count % 1_000 == 0:
            bar.update(task, completed=count)
        yield operation


def _print_load(client: Client, file: OperationFile, summary: dict[str, Any], *, waited: bool) -> None:
    request_id = summary["request_id"]
    if "error" in summary:
        messages.print(f"[bold red]error:[/] {escaped(summary['message'])}")
        messages.print(f"to see its state: mdstore status {request_id} --watch")
        return
    if not summary["new"]:
        again = "it was sent again; operations already applied are skipped" if summary["sent"] else "nothing was sent"
        results.print(f"request {request_id} was accepted before with the same content: {again}")
    results.print(escaped(f"{file.path}: {summary_line(summary)}"))
    if summary["refused"]:
        for outcome in islice(client.outcomes(request_id, only="refused"), 5):
            results.print(escaped(f"  {outcome_line(outcome, place=file.place(outcome.index))}"))
        results.print(f"  to list all: mdstore status {request_id} --outcomes refused")
    if waited and summary["state"] not in FINAL_STATES:
        messages.print(f"the request is not finished, and continues: mdstore status {request_id} --watch")


def _exit_code(summary: dict[str, Any], *, waited: bool) -> int:
    if "error" in summary:
        return NOT_FINISHED
    if summary["failed"] or summary["state"] == State.FAILED:
        return 1
    if waited and summary["state"] not in FINAL_STATES:
        return NOT_FINISHED
    return REFUSED if summary["refused"] else 0
