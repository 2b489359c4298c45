"""Commands for the deployment: provision, config, key."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.table import Table

from mdstore.cli.celery_app import app_option
from mdstore.cli.console import emit, escaped, json_option, messages, results
from mdstore.client import Client
from mdstore.errors import NotFound
from mdstore.settings import load_settings
from mdstore.store.api_keys import Scope

if TYPE_CHECKING:
    from mdstore.queue.app import SqsApp


@click.command()
@click.option(
    "--store/--no-store",
    default=None,
    help="Also create the data store's tables. The default is to create them, except for an --app without the store's tasks.",
)
@click.option(
    "--queue", "queues", multiple=True, help="A further queue for tasks; repeat the option for several queues."
)
@app_option
@json_option
def provision(store: bool | None, queues: tuple[str, ...], app: SqsApp | None, as_json: bool) -> None:
    """Create missing buckets, queues, topics and tables. Existing ones are kept.

    With --app, also create all queues of the app's `task_queues`.
    """
    from mdstore.provision import provision as create_missing  # noqa: PLC0415  the command has the same name

    settings, with_store = load_settings().settings, store is not False
    if app is not None:
        settings, queues = app.settings, (*app.queue_names(), *queues)
        with_store = app.has_store if store is None else store
    rows = []
    for kind, name, created in create_missing(settings, with_store=with_store, queues=queues):
        rows.append({"kind": kind, "name": name, "created": created})
        if not as_json:
            results.print(f"{kind:<7}{name:<28}{'created' if created else 'exists'}")
    if as_json:
        emit(rows)


@click.command()
@json_option
def config(as_json: bool) -> None:
    """Show all settings and their origins. Secrets are masked."""
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
    """Create and revoke keys of the HTTP API."""


@key.command("create")
@click.option("--source", required=True, help="Source (tenant) of the requests made with the key.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([str(scope) for scope in Scope]),
    default=("write", "read"),
    show_default=True,
    help="What the key allows; repeat the option for several scopes.",
)
@json_option
def create_key(source: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Create a key and print it. Only its digest is stored, so it cannot be shown again."""
    created = Client().store.api_keys.create(source=source, scopes=scopes)
    if as_json:
        emit({"key": created, "source": source, "scopes": scopes})
    else:
        click.echo(created)


@key.command("revoke")
@json_option
def revoke_key(as_json: bool) -> None:
    """Revoke the key given on standard input.

    The key is not an argument, because other users of the machine can read command lines. Servers reject it within a minute.
    """
    if not Client().store.api_keys.revoke(sys.stdin.readline().strip()):
        raise NotFound("key", "<standard input>")
    if as_json:
        emit({"revoked": True})
    else:
        messages.print("revoked")
