"""Commands that run a process until it is stopped: up, worker, api, flower."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from mdstore.cli.celery_app import app_option
from mdstore.cli.console import emit, json_option, messages
from mdstore.errors import ConfigurationError, MdstoreError
from mdstore.running_stack import announced
from mdstore.settings import LOCAL_PORT, load_settings

if TYPE_CHECKING:
    from mdstore.queue.app import SqsApp

_PORT = click.IntRange(1, 65_535)


@click.command()
@click.option("--port", type=_PORT, default=LOCAL_PORT, show_default=True, help="Port of the embedded AWS.")
@click.option("--api-port", type=_PORT, help="Port of the HTTP API.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the embedded AWS's state, saved every few seconds. Without it, the state ends with the process.",
)
@json_option
def up(port: int, api_port: int | None, data_dir: Path | None, as_json: bool) -> None:
    """Run embedded AWS, worker and HTTP API in the foreground. Ctrl-C stops all of them."""
    from mdstore.local.stack import Stack  # noqa: PLC0415  the emulator and the HTTP API are extras

    settings = load_settings().settings
    # SIGINT needs a handler too: a shell makes its background commands ignore SIGINT, and child processes inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    stack = Stack(
        port=port,
        api_port=api_port or settings.api_port,
        data_dir=data_dir,
        report=(lambda _: None) if as_json else messages.print,
    )
    try:
        with stack, announced(stack.aws.url) as is_found:
            if as_json:
                emit({"aws": stack.aws.url, "api": stack.api_url, "key": stack.api_key})
                sys.stdout.flush()
            else:
                found = "mdstore commands find this stack automatically; " if is_found else ""
                messages.print(f"other shells   {found}export AWS_ENDPOINT_URL={stack.aws.url}")
                messages.print("ready; press Ctrl-C to stop")
            exited = stack.wait()
            raise MdstoreError(f"the process {exited} exited unexpectedly; all others were stopped")
    except KeyboardInterrupt:
        messages.print("stopped")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@click.command()
@click.option("--concurrency", "-c", type=click.IntRange(1), help="Number of pool processes.")
@click.option("--log-level", "-l", default="INFO", show_default=True, help="Celery's log level.")
@click.option("--quiet", is_flag=True, help="Print neither Celery's banner nor its warning about running as root.")
@json_option
def worker(concurrency: int | None, log_level: str, quiet: bool, as_json: bool) -> None:
    """Run a Celery worker. `celery -A workers.celery_app worker` runs the same."""
    from celery.exceptions import SecurityWarning  # noqa: PLC0415  most commands need no Celery

    from mdstore.tasks import create_store_app  # noqa: PLC0415

    _ = as_json  # a worker has no result
    if quiet:
        warnings.simplefilter("ignore", SecurityWarning)
    settings = load_settings().settings
    arguments = ["worker", "--loglevel", log_level, "--concurrency", str(concurrency or settings.concurrency)]
    create_store_app(settings).worker_main(["--quiet", *arguments] if quiet else arguments)


@click.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=_PORT, help="Port to listen on.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of server processes.")
@json_option
def api(host: str | None, port: int | None, workers: int, as_json: bool) -> None:
    """Serve the HTTP API.

    With several processes, each has the limits of `docs/http-api.md` for itself. One that dies is replaced.
    """
    try:
        from mdstore.api.server import serve  # noqa: PLC0415  an extra
    except ImportError as error:
        raise ConfigurationError(
            key="api", value="not installed", expected='the extra "api": pip install "mdstore[api]"'
        ) from error
    _ = as_json  # a server has no result
    settings = load_settings().settings
    serve(settings, host=host or settings.api_host, port=port or settings.api_port, workers=workers)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--name",
    default="flower",
    show_default=True,
    help="Suffix of the event queue's name; each Flower needs its own.",
)
@app_option
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@json_option
def flower(name: str, app: SqsApp | None, options: tuple[str, ...], as_json: bool) -> None:
    """Serve Flower on 127.0.0.1:5555.

    Flower is a web page that shows Celery's workers and tasks. It also takes its own options here. It knows the tasks of the
    data store or, with --app, those of your own app.
    """
    from mdstore.queue.control.flower import run  # noqa: PLC0415  an extra

    _ = as_json  # a server has no result
    from mdstore.tasks import create_store_app  # noqa: PLC0415

    app = app or create_store_app()
    run(app.settings, options, name=name, app=app)
