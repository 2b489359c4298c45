"""The command line. Results go to standard output (with `--json` as one JSON value), progress and messages to standard error.

Exit codes: 0 done; 1 an error, or an operation failed; 2 wrong usage; 3 some operations were refused; 4 no such record
or request; 5 verification found a fault; 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import IO, Any, NoReturn, ParamSpec

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mdstore import exactjson
from mdstore.apikeys import Scope
from mdstore.client import Client
from mdstore.errors import InvalidRequest, MdstoreError, NotFound, Unavailable
from mdstore.files import read_operations
from mdstore.ledger import Request
from mdstore.model import FINAL_STATES, Outcome, State
from mdstore.settings import LOCAL_PORT, load_settings
from mdstore.signed import NO_CONNECTION

P = ParamSpec("P")
REFUSED, ABSENT, UNVERIFIED, INTERRUPTED = 3, 4, 5, 130

messages = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)


def emit(value: Any) -> None:
    """Print one JSON value."""
    click.echo(exactjson.dumps(value).decode())


def json_option(command: Callable[P, None]) -> Callable[P, None]:
    """Add `--json`, and turn the package's errors into a message and exit code 1 (4 for what does not exist)."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (MdstoreError, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            if kwargs.get("as_json"):
                emit({"error": type(error).__name__, "message": str(error)})
            else:
                messages.print(f"[bold red]error:[/] {_escaped(error)}")
                if isinstance(error, Unavailable) and error.code in ("EndpointConnectionError", NO_CONNECTION):
                    messages.print("Nothing answers there. In the profile local: is `mdstore up` (make up) running?")
            sys.exit(ABSENT if isinstance(error, NotFound) else 1)
        except KeyboardInterrupt:
            messages.print("interrupted")
            sys.exit(INTERRUPTED)

    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(run)


def _escaped(value: object) -> str:
    return str(value).replace("[", r"\[")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mdstore")
def main() -> None:
    """A master data store on DynamoDB, fed through S3, SQS and Celery."""


@main.command()
@click.option("--port", default=LOCAL_PORT, show_default=True, help="Port of the embedded AWS.")
@click.option("--api-port", type=int, help="Port of the front door.")
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Keep the state here between runs.")
@json_option
def up(port: int, api_port: int | None, data_dir: Path | None, as_json: bool) -> None:
    """Embedded AWS, worker and front door, in the foreground; Ctrl-C stops all."""
    from mdstore.stack import Stack  # noqa: PLC0415  the emulator and the front door are extras

    settings = load_settings().settings
    # SIGINT too: a shell that starts a command in the background has it ignored, and that is inherited.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    stack = Stack(
        port=port,
        api_port=api_port or settings.api_port,
        data_dir=data_dir,
        report=(lambda _: None) if as_json else messages.print,
    )
    try:
        with stack:
            if as_json:
                emit({"aws": stack.aws.url, "api": stack.api_url, "key": stack.api_key})
                sys.stdout.flush()
            else:
                messages.print("ready; Ctrl-C stops")
            ended = stack.wait()
            raise MdstoreError(f"the {ended} ended by itself; all is stopped")
    except KeyboardInterrupt:
        messages.print("stopped")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@main.command()
@json_option
def provision(as_json: bool) -> None:
    """Create bucket, queues, topics and tables; safe to repeat."""
    from mdstore.provision import provision as steps  # noqa: PLC0415  the command has its name

    rows = []
    for kind, name, created in steps(load_settings().settings):
        rows.append({"kind": kind, "name": name, "created": created})
        if not as_json:
            results.print(f"{kind:<7}{name:<28}{'created' if created else 'is there'}")
    if as_json:
        emit(rows)


@main.command()
@click.option("--concurrency", "-c", type=click.IntRange(1), help="Worker processes.")
@click.option("--log-level", "-l", default="INFO", show_default=True)
@click.option("--quiet", is_flag=True, help="No banner.")
@json_option
def worker(concurrency: int | None, log_level: str, quiet: bool, as_json: bool) -> None:
    """A Celery worker; the same as `celery -A workers.celery_app worker`."""
    from mdstore.queue import create_app  # noqa: PLC0415

    _ = as_json  # a worker has no result
    settings = load_settings().settings
    arguments = ["worker", "--loglevel", log_level, "--concurrency", str(concurrency or settings.concurrency)]
    create_app(settings).worker_main(["--quiet", *arguments] if quiet else arguments)


@main.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on.")
@json_option
def api(host: str | None, port: int | None, as_json: bool) -> None:
    """The front door."""
    import uvicorn  # noqa: PLC0415  an extra

    from mdstore.api import create_api  # noqa: PLC0415

    _ = as_json  # a server has no result
    settings = load_settings().settings
    uvicorn.run(
        create_api(settings),
        host=host or settings.api_host,
        port=port or settings.api_port,
        log_level="warning",
        timeout_keep_alive=75,  # longer than a load balancer's 60 s, which would else meet closed connections
    )


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--name", default="flower", show_default=True, help="Of its event queue; a second Flower needs another.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@json_option
def flower(name: str, options: tuple[str, ...], as_json: bool) -> None:
    """Flower, the web page of Celery's workers and tasks, on 127.0.0.1:5555; takes Flower's own options."""
    from mdstore.flower import run  # noqa: PLC0415  an extra

    _ = as_json  # a server has no result
    run(load_settings().settings, options, name=name)


@main.command()
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--request-id", help="The idempotency key; the same id and content is the same request. Of one file only."
)
@click.option("--source", default="default", show_default=True, help="Who sends it.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the final state.")
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds to wait.")
@click.option("--entity", help="Of a table's rows.")
@click.option("--key", "key_column", help="The column of a table's keys.")
@click.option(
    "--op", type=click.Choice(["insert", "update", "patch", "upsert", "delete"]), default="upsert", show_default=True
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
    as_json: bool,
) -> None:
    """Load files of operations, one request a file. An invalid line is refused and the others go on."""
    if request_id is not None and (len(files) > 1 or not request_id):
        raise InvalidRequest(field="--request-id", value=request_id, expected="an id, with one file")
    client = Client()
    summaries: list[dict[str, Any]] = []
    # All files are looked at before anything of the first is sent.
    sources = [read_operations(file, entity=entity, key=key_column, op=op) for file in files]
    for file, operations in zip(files, sources, strict=True):
        name = request_id or f"load-{uuid.uuid4()}"
        with _progress(hidden=as_json) as bar:
            summaries.append(_load_one(client, bar, operations, name, source, timeout if wait else None))
        if not as_json:
            _print_load(client, file, summaries[-1])
    if as_json:
        emit(summaries[0] if len(summaries) == 1 else summaries)
    codes = {_exit_code(summary) for summary in summaries}
    sys.exit(1 if 1 in codes else max(codes))


def _load_one(
    client: Client, bar: Progress, operations: Iterable[Any], request_id: str, source: str, timeout: float | None
) -> dict[str, Any]:
    task = bar.add_task("reading", total=None)
    submission = client.submit(
        _counted(operations, bar, task), request_id=request_id, source=source, on_invalid="refuse"
    )
    bar.update(task, description="applying", total=submission.operations, completed=0)
    bar.console.print(f"request {request_id} is accepted")

    def show(request: Request) -> None:
        bar.update(task, completed=request.counts.total)

    try:
        request = submission.status() if timeout is None else client.wait(request_id, timeout=timeout, progress=show)
    except KeyboardInterrupt:
        bar.stop()
        messages.print(f"the request goes on without this command: mdstore status {request_id}")
        sys.exit(INTERRUPTED)
    return {**request.summary(), "new": submission.new, "sent": submission.sent}


def _counted(operations: Iterable[Any], bar: Progress, task: Any) -> Iterator[Any]:
    for count, operation in enumerate(operations, 1):
        if count % 1_000 == 0:
            bar.update(task, completed=count)
        yield operation


def _progress(*, hidden: bool) -> Progress:
    columns = (
        TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=messages, disable=hidden)


def _print_load(client: Client, file: str, summary: dict[str, Any]) -> None:
    if not summary["new"]:
        what = "sent again, what is done is not done again" if summary["sent"] else "nothing was sent, nothing changed"
        results.print(f"request {summary['request_id']} was accepted before with the same content: {what}")
    results.print(f"{file}: {_line(summary)}")
    if summary["refused"]:
        for outcome in _first(client.outcomes(summary["request_id"], only="refused"), 5):
            results.print(_escaped(f"  {_outcome_line(outcome)}"))
        results.print(f"  all of them: mdstore status {summary['request_id']} --outcomes refused")


def _first(outcomes: Iterator[Outcome], count: int) -> Iterator[Outcome]:
    for _, outcome in zip(range(count), outcomes, strict=False):
        yield outcome


def _line(summary: dict[str, Any]) -> str:
    by_op = ", ".join(f"{count:,} {_PAST.get(op, op)}" for op, count in summary["applied_by_op"].items())
    by_reason = ", ".join(f"{count:,} {reason}" for reason, count in summary["refused_by_reason"].items())
    return (
        f"request {summary['request_id']} {summary['state']}: {summary['operations']:,} operations,"
        f" {summary['applied']:,} applied{f' ({by_op})' if by_op else ''},"
        f" {summary['refused']:,} refused{f' ({by_reason})' if by_reason else ''}, {summary['failed']:,} failed"
    )


_PAST = {
    "insert": "inserted",
    "update": "updated",
    "patch": "patched",
    "upsert": "upserted",
    "delete": "deleted",
    "check": "checked",
}


def _exit_code(summary: dict[str, Any]) -> int:
    if summary["failed"] or summary["state"] == State.FAILED:
        return 1
    return REFUSED if summary["refused"] else 0


def _outcome_line(outcome: Outcome) -> str:
    what = f"{outcome.op or '?'} {outcome.entity or '?'}/{outcome.key or '?'}"
    reason = f" {outcome.reason}" if outcome.reason else ""
    return f"operation {outcome.index}: {what}: {outcome.outcome}{reason}" + (
        f" ({outcome.detail})" if outcome.detail else ""
    )


@main.command()
@click.argument("request_id", metavar="REQUEST")
@click.option("--watch", is_flag=True, help="Repeat until the state is final.")
@click.option(
    "--outcomes",
    "only",
    is_flag=False,
    flag_value="all",
    type=click.Choice(["all", "applied", "refused", "failed"]),
    help="List outcomes, all or some.",
)
@json_option
def status(request_id: str, watch: bool, only: Any, as_json: bool) -> None:
    """State, counts, rate and ETA of a request."""
    client = Client()
    request = client.status(request_id)
    if watch:
        with _progress(hidden=as_json) as bar:
            task = bar.add_task("applying", total=request.operations)
            while request.state not in FINAL_STATES:
                bar.update(task, completed=request.counts.total)
                time.sleep(0.5)
                request = client.status(request_id)
    found = client.outcomes(request_id, only=None if only == "all" else only) if only else iter(())
    if as_json:
        value = _status(request)
        emit({**value, "outcomes": [msgspec.to_builtins(one) for one in found]} if only else value)
        return
    results.print(_line(request.summary()))
    if request.error:
        results.print(_escaped(f"error: {request.error}"))
    rate, eta = _rate(request)
    results.print(f"{rate:,.0f} operations/s" + (f", {eta:,.0f} s to go" if eta is not None else ""))
    for outcome in found:
        results.print(_escaped(_outcome_line(outcome)))


def _status(request: Request) -> dict[str, Any]:
    rate, eta = _rate(request)
    return {
        **request.summary(),
        "source": request.source,
        "lanes": request.lanes,
        "accepted_at": request.accepted_at,
        "started_at": request.started_at,
        "finished_at": request.finished_at,
        "error": request.error,
        "rate": round(rate, 1),
        "eta": eta,
    }


def _rate(request: Request) -> tuple[float, float | None]:
    """Operations a second since the start, and the seconds that the rest takes at that rate."""
    if request.started_at is None:
        return 0.0, None
    done = request.counts.total
    rate = done / max((request.finished_at or time.time()) - request.started_at, 0.001)
    return rate, None if request.state in FINAL_STATES or not done else (request.operations - done) / rate


@main.command()
@click.argument("entity")
@click.argument("key")
@json_option
def get(entity: str, key: str, as_json: bool) -> None:
    """One record; exit 4 when it is absent."""
    record = Client().get(entity, key)
    if as_json:
        emit(record)
        return
    results.print(f"{entity}/{key}  version {record.version}  by {record.updated_by}", markup=False)
    click.echo(msgspec.json.format(exactjson.dumps(record.data), indent=2).decode())


@main.command()
@click.option("--entity", help="Only this kind of records.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write here; - or none is standard output.",
)
@json_option
def export(entity: str | None, out: Path | None, as_json: bool) -> None:
    """All records as JSON Lines: entity, key, version, data."""
    count = 0
    out = None if out == Path("-") else out
    with ExitStack() as stack:
        target: IO[bytes] = stack.enter_context(out.open("wb")) if out else sys.stdout.buffer
        for record in Client().export(entity):
            line = {"entity": record.entity, "key": record.key, "version": record.version, "data": record.data}
            target.write(exactjson.dumps(line) + b"\n")
            count += 1
        target.flush()
    if as_json and out:
        emit({"records": count, "out": str(out)})
    elif out:
        messages.print(f"{count:,} records in {out}")


@main.command()
@click.argument("request_id", metavar="REQUEST")
@json_option
def verify(request_id: str, as_json: bool) -> None:
    """Compare payload, receipts and records; exit 5 when an operation lacks its outcome or its effect."""
    found = Client().verify(request_id)
    if as_json:
        emit({
            "request_id": found.request_id, "ok": found.ok, "operations": found.operations, "applied": found.applied,
            "refused": found.refused, "superseded": found.superseded, "fault_count": found.fault_count, "faults": found.faults,
        })  # fmt: skip
    else:
        verdict = "verified" if found.ok else f"{found.fault_count:,} faults"
        results.print(
            f"request {request_id}: {verdict}: {found.operations:,} outcomes, {found.applied:,} applied,"
            f" {found.refused:,} refused, {found.superseded:,} replaced by a later request"
        )
        for fault in found.faults:
            results.print(_escaped(f"  {fault}"))
    sys.exit(0 if found.ok else UNVERIFIED)


@main.group()
def key() -> None:
    """Bearer keys of the front door."""


@key.command("create")
@click.option("--source", required=True, help="Whom requests made with the key come from.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([str(scope) for scope in Scope]),
    default=("write", "read"),
    show_default=True,
)
@json_option
def create_key(source: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Make a key and print it; only its digest is kept, so it cannot be printed again."""
    made = Client().store.api_keys.create(source=source, scopes=scopes)
    if as_json:
        emit({"key": made, "source": source, "scopes": scopes})
    else:
        click.echo(made)


@key.command("revoke")
@json_option
def revoke_key(as_json: bool) -> None:
    """End the key that standard input holds; it never stands in a command line. Front doors notice within a minute."""
    if not Client().store.api_keys.revoke(sys.stdin.readline().strip()):
        raise NotFound("key", "of standard input")
    if as_json:
        emit({"revoked": True})
    else:
        messages.print("revoked")


@main.command()
@json_option
def config(as_json: bool) -> None:
    """Every setting, its value and where it came from; secrets masked."""
    rows = load_settings().rows()
    if as_json:
        emit([{"name": name, "value": value, "origin": origin} for name, value, origin in rows])
        return
    table = Table("setting", "value", "from", box=None)
    for name, value, origin in rows:
        table.add_row(name, "" if value is None else _escaped(value), origin)
    results.print(table)
