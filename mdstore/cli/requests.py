"""Commands for requests: status, verify."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import msgspec

from mdstore.cli.console import (
    UNVERIFIED,
    emit,
    escaped,
    json_option,
    outcome_line,
    progress_bar,
    results,
    summary_line,
)
from mdstore.client import Client
from mdstore.model import FINAL_STATES
from mdstore.store.ledger_items import RequestStatus
from mdstore.timestamps import moment


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
            bar.update(task, completed=request.counts.total)
    found = client.outcomes(request_id, only=None if only == "all" else only) if only else iter(())
    if as_json:
        value = _status(request)
        emit({**value, "outcomes": [msgspec.to_builtins(one) for one in found]} if only else value)
        return
    results.print(summary_line(request.summary()))
    if request.error:
        results.print(escaped(f"error: {request.error}"))
    rate, eta = _rate(request)
    results.print(f"{rate:,.0f} operations/s" + (f", about {eta:,.0f} s left" if eta is not None else ""))
    for outcome in found:
        results.print(escaped(outcome_line(outcome)))


def _status(request: RequestStatus) -> dict[str, Any]:
    rate, eta = _rate(request)
    return {
        **request.summary(),
        "source": request.source,
        "lanes": request.lanes,
        "accepted_at": moment(request.accepted_at),
        "started_at": moment(request.started_at),
        "finished_at": moment(request.finished_at),
        "error": request.error,
        "rate": round(rate, 1),
        "eta": eta,
    }


def _rate(request: RequestStatus) -> tuple[float, float | None]:
    """Return the operations per second since the start, and the estimated seconds left, or None if there is no estimate."""
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
            "refused": found.refused, "superseded": found.superseded, "same_models": found.same_models,
            "fault_count": found.fault_count, "faults": found.faults,
        })  # fmt: skip
    else:
        finding = "verified" if found.ok else f"verification found {found.fault_count:,} faults"
        results.print(
            f"request {request_id}: {finding}: {found.operations:,} outcomes, {found.applied:,} applied,"
            f" {found.refused:,} refused, {found.superseded:,} since replaced by later requests"
        )
        if not found.same_models:
            results.print(
                "note: the request was checked against other models than those of this command's settings (`entities`);"
                " what a patch makes of a record may differ"
            )
        for fault in found.faults:
            results.print(escaped(f"  {fault}"))
    sys.exit(0 if found.ok else UNVERIFIED)
