"""Commands for requests: load, status, verify."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import click
import msgspec
from rich.progress import Progress

from mdstore.cli.console import (
    INTERRUPTED,
    REFUSED,
    UNVERIFIED,
    emit,
    escaped,
    json_option,
    messages,
    progress_bar,
    results,
)
from mdstore.client import Client
from mdstore.errors import InvalidRequest
from mdstore.files import read_operations
from mdstore.model import FINAL_STATES, Outcome, State
from mdstore.store.ledger import RequestStatus
from mdstore.store.operations import OPERATIONS, WRITING_OPS


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--request-id", help="Idempotency key: repeating it with the same content changes nothing. Allowed with one file."
)
@click.option("--source", default="default", show_default=True, help="Source (tenant) that sends the request.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the final state.")
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds to wait at most.")
@click.option("--entity", help="Entity of the rows of a CSV or Parquet file.")
@click.option("--key", "key_column", help="Column with the keys of a CSV or Parquet file.")
@click.option(
    "--op",
    type=click.Choice(WRITING_OPS),
    default="upsert",
    show_default=True,
    help="Operation for each row of a CSV or Parquet file.",
)
@click.option(
    "--newest-wins",
    is_flag=True,
    help="Let the highest `sequence` of each key win; inserts and updates become upserts.",
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
    newest_wins: bool,
    as_json: bool,
) -> None:
    """Load operations from files; each file becomes one request. Invalid lines are refused, and the others are applied."""
    if request_id is not None and (len(files) > 1 or not request_id):
        raise InvalidRequest(field="--request-id", value=request_id, expected="one id for one file")
    client = Client()
    summaries: list[dict[str, Any]] = []
    # Check that all files exist and have a known format before the first request is sent.
    inputs = [read_operations(file, entity=entity, key=key_column, op=op) for file in files]
    for file, operations in zip(files, inputs, strict=True):
        name = request_id or f"load-{uuid.uuid4()}"
        with progress_bar(hidden=as_json) as bar:
            options = {"request_id": name, "source": source, "newest_wins": newest_wins}
            summaries.append(_load_one(client, bar, operations, options, timeout if wait else None))
        if not as_json:
            _print_load(client, file, summaries[-1])
    if as_json:
        emit(summaries[0] if len(summaries) == 1 else summaries)
    codes = {_exit_code(summary) for summary in summaries}
    sys.exit(1 if 1 in codes else max(codes))


def _load_one(
    client: Client, bar: Progress, operations: Iterable[Any], options: dict[str, Any], timeout: float | None
) -> dict[str, Any]:
    task = bar.add_task("reading", total=None)
    submission = client.submit(_counted(operations, bar, task), on_invalid="refuse", **options)
    request_id = submission.request_id
    bar.update(task, description="applying", total=submission.operations, completed=0)
    bar.console.print(f"request {request_id} accepted")

    def show(request: RequestStatus) -> None:
        bar.update(task, completed=request.counts.total)

    try:
        request = submission.status() if timeout is None else client.wait(request_id, timeout=timeout, progress=show)
    except KeyboardInterrupt:
        bar.stop()
        messages.print(f"the request continues; to see its progress: mdstore status {request_id}")
        sys.exit(INTERRUPTED)
    return {**request.summary(), "new": submission.new, "sent": submission.sent}


def _counted(operations: Iterable[Any], bar: Progress, task: Any) -> Iterator[Any]:
    for count, operation in enumerate(operations, 1):
        if count % 1_000 == 0:
            bar.update(task, completed=count)
        yield operation


def _print_load(client: Client, file: str, summary: dict[str, Any]) -> None:
    if not summary["new"]:
        again = "it was sent again; operations already applied are skipped" if summary["sent"] else "nothing was sent"
        results.print(f"request {summary['request_id']} was accepted before with the same content: {again}")
    results.print(f"{file}: {_line(summary)}")
    if summary["refused"]:
        for outcome in _first(client.outcomes(summary["request_id"], only="refused"), 5):
            results.print(escaped(f"  {_outcome_line(outcome)}"))
        results.print(f"  to list all: mdstore status {summary['request_id']} --outcomes refused")


def _first(outcomes: Iterator[Outcome], count: int) -> Iterator[Outcome]:
    for _, outcome in zip(range(count), outcomes, strict=False):
        yield outcome


def _line(summary: dict[str, Any]) -> str:
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


@click.command()
@click.argument("request_id", metavar="REQUEST")
@click.option("--watch", is_flag=True, help="Show progress until the state is final.")
@click.option(
    "--outcomes",
    "only",
    is_flag=False,
    flag_value="all",
    type=click.Choice(["all", "applied", "refused", "failed"]),
    help="Also list outcomes: all of them, or those of one kind.",
)
@json_option
def status(request_id: str, watch: bool, only: Any, as_json: bool) -> None:
    """Show a request's state, counts, rate and time left."""
    client = Client()
    request = client.status(request_id)
    if watch:
        with progress_bar(hidden=as_json) as bar:
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
        results.print(escaped(f"error: {request.error}"))
    rate, eta = _rate(request)
    results.print(f"{rate:,.0f} operations/s" + (f", about {eta:,.0f} s left" if eta is not None else ""))
    for outcome in found:
        results.print(escaped(_outcome_line(outcome)))


def _status(request: RequestStatus) -> dict[str, Any]:
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


def _rate(request: RequestStatus) -> tuple[float, float | None]:
    """Return the operations a second since the start, and the estimated seconds left, or None if there is no estimate."""
    if request.started_at is None:
        return 0.0, None
    done = request.counts.total
    rate = done / max((request.finished_at or time.time()) - request.started_at, 0.001)
    return rate, None if request.state in FINAL_STATES or not done else (request.operations - done) / rate


@click.command()
@click.argument("request_id", metavar="REQUEST")
@json_option
def verify(request_id: str, as_json: bool) -> None:
    """Compare a request's payload, receipts and records. The exit code is 5 if an operation lacks its outcome or effect."""
    found = Client().verify(request_id)
    if as_json:
        emit({
            "request_id": found.request_id, "ok": found.ok, "operations": found.operations, "applied": found.applied,
            "refused": found.refused, "superseded": found.superseded, "fault_count": found.fault_count, "faults": found.faults,
        })  # fmt: skip
    else:
        finding = "verified" if found.ok else f"verification found {found.fault_count:,} faults"
        results.print(
            f"request {request_id}: {finding}: {found.operations:,} outcomes, {found.applied:,} applied,"
            f" {found.refused:,} refused, {found.superseded:,} since replaced by later requests"
        )
        for fault in found.faults:
            results.print(escaped(f"  {fault}"))
    sys.exit(0 if found.ok else UNVERIFIED)
