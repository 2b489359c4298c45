"""Commands that run processes: up, worker, api, flower."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from mdstore.cli.console import emit, json_option, messages
from mdstore.errors import ConfigurationError, MdstoreError
from mdstore.settings import LOCAL_PORT, load_settings


@click.command()
@click.option("--port", default=LOCAL_PORT, show_default=True, help="Port of the embedded AWS.")
@click.option("--api-port", type=int, help="Port of the front door.")
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Keep the state here between runs.")
@json_option
def up(port: int, api_port: int | None, data_dir: Path | None, as_json: bool) -> None:
    """Embedded AWS, worker and front door, in the foreground; Ctrl-C stops all."""
    from mdstore.local.stack import Stack  # noqa: PLC0415  the emulator and the front door are extras

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


@click.command()
@click.option("--concurrency", "-c", type=click.IntRange(1), help="Worker processes.")
@click.option("--log-level", "-l", default="INFO", show_default=True)
@click.option("--quiet", is_flag=True, help="No banner.")
@json_option
def worker(concurrency: int | None, log_level: str, quiet: bool, as_json: bool) -> None:
    """A Celery worker; the same as `celery -A workers.celery_app worker`."""
    from mdstore.tasks import create_store_app  # noqa: PLC0415

    _ = as_json  # a worker has no result
    settings = load_settings().settings
    arguments = ["worker", "--loglevel", log_level, "--concurrency", str(concurrency or settings.concurrency)]
    create_store_app(settings).worker_main(["--quiet", *arguments] if quiet else arguments)


@click.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on.")
@json_option
def api(host: str | None, port: int | None, as_json: bool) -> None:
    """The front door."""
    try:
        import uvicorn  # noqa: PLC0415  an extra

        from mdstore.api import create_api  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            key="api", value="not installed", expected='the extra "api": pip install "mdstore[api]"'
        ) from error
    _ = as_json  # a server has no result
    settings = load_settings().settings
    uvicorn.run(
        create_api(settings),
        host=host or settings.api_host,
        port=port or settings.api_port,
        log_level="warning",
        timeout_keep_alive=75,  # longer than a load balancer's 60 s, which would else meet closed connections
    )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--name", default="flower", show_default=True, help="Of its event queue; a second Flower needs another.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@json_option
def flower(name: str, options: tuple[str, ...], as_json: bool) -> None:
    """Flower, the web page of Celery's workers and tasks, on 127.0.0.1:5555; takes Flower's own options."""
    from mdstore.queue.control.flower import run  # noqa: PLC0415  an extra

    _ = as_json  # a server has no result
    run(load_settings().settings, options, name=name)
