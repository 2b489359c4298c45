"""Commands that read records: get, export."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import click
import msgspec

from mdstore import exactjson
from mdstore.cli.console import emit, json_option, messages, results
from mdstore.client import Client
from mdstore.timestamps import moment


@click.command()
@click.argument("entity")
@click.argument("key")
@json_option
def get(entity: str, key: str, as_json: bool) -> None:
    """Print one record. The exit code is 4 if it does not exist."""
    record = Client().get(entity, key)
    if as_json:
        emit({**msgspec.structs.asdict(record), "updated_at": moment(record.updated_at)})
        return
    results.print(f"{entity}/{key}  version {record.version}  by {record.updated_by}", markup=False)
    click.echo(msgspec.json.format(exactjson.dumps(record.data), indent=2).decode())


@click.command()
@click.option("--entity", help="Export only the records of this entity.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="File to write; without it, or with -, standard output.",
)
@json_option
def export(entity: str | None, out: Path | None, as_json: bool) -> None:
    """Write all records as JSON Lines. Each line has entity, key, version and data."""
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
        messages.print(f"wrote {count:,} records to {out}")
