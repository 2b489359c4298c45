"""The option `--app`, which names a user's own Celery app."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mdstore.queue.app import SqsApp


def load_app(_context: click.Context, _option: click.Parameter, path: str | None) -> SqsApp | None:
    """Import the app that the option names. The working directory is searched too."""
    if path is None:
        return None
    from celery.app.utils import find_app  # noqa: PLC0415  most commands need no Celery

    from mdstore.queue.app import SqsApp  # noqa: PLC0415

    try:
        found = find_app(path)
    except (ImportError, AttributeError) as error:
        raise click.BadParameter(f"{path!r} cannot be imported: {error}") from error
    if not isinstance(found, SqsApp):
        raise click.BadParameter(f"{path!r} is {found!r}: expected an app that mdstore.queue.create_app made")
    return found


app_option = click.option("--app", callback=load_app, help="Your own Celery app, by the path that `celery -A` takes.")
