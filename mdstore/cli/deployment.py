"""Commands about the deployment: provision, config, key."""

from __future__ import annotations

import sys

import click
from rich.table import Table

from mdstore.cli.console import emit, escaped, json_option, messages, results
from mdstore.client import Client
from mdstore.errors import NotFound
from mdstore.settings import load_settings
from mdstore.store.api_keys import Scope


@click.command()
@click.option("--store/--no-store", default=True, show_default=True, help="Also the data store's own tables.")
@json_option
def provision(store: bool, as_json: bool) -> None:
    """Create bucket, queues, topics and tables; safe to repeat."""
    from mdstore.provision import provision as steps  # noqa: PLC0415  the command has its name

    rows = []
    for kind, name, created in steps(load_settings().settings, with_store=store):
        rows.append({"kind": kind, "name": name, "created": created})
        if not as_json:
            results.print(f"{kind:<7}{name:<28}{'created' if created else 'is there'}")
    if as_json:
        emit(rows)


@click.command()
@json_option
def config(as_json: bool) -> None:
    """Every setting, its value and where it came from; secrets masked."""
    rows = load_settings().rows()
    if as_json:
        emit([{"name": name, "value": value, "origin": origin} for name, value, origin in rows])
        return
    table = Table("setting", "value", "from", box=None)
    for name, value, origin in rows:
        table.add_row(name, "" if value is None else escaped(value), origin)
    results.print(table)


@click.group()
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
