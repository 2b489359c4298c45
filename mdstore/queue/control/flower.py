"""The Flower process: the web page of https://flower.readthedocs.io over SNS and SQS.

Nothing of Flower or Celery is patched. The transport knows the event exchange by its name, and gives its listener the queue
`{events_topic}-{name}`, which a restarted Flower uses again.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Sequence

from mdstore.errors import ConfigurationError
from mdstore.queue.app import SqsApp, create_app
from mdstore.settings import Settings

#: Defaults of Flower's options. As usual, the environment (`FLOWER_...`), Flower's file and the command line override them.
DEFAULTS = {
    "address": "127.0.0.1",
    "inspect_timeout": 4_000.0,  # ms: a command goes through SNS and a queue, and its answer through another queue
    "enable_events": False,  # workers send events anyway; true would send a command to all of them every 5 s
}


def run(settings: Settings, arguments: Sequence[str], *, name: str = "flower", app: SqsApp | None = None) -> None:
    """Serve until stopped. Flower knows the tasks of `app`, if one is given.

    Two Flowers of one namespace need two names, because each event goes to one reader of a queue.
    Raises `ConfigurationError` if Flower is not installed, would show nothing, or would be open to the network without a
    password.
    """
    if not settings.events or not settings.remote_control:
        key = "remote_control" if settings.events else "events"
        raise ConfigurationError(key=key, value=False, expected="true: without it Flower shows nothing")
    try:
        from flower import command  # noqa: PLC0415  Flower is an extra
    except ImportError as error:
        raise ConfigurationError(
            key="flower", value="not installed", expected='the extra "flower": pip install "mdstore[flower]"'
        ) from error
    for option, value in DEFAULTS.items():
        setattr(command.options, option, value)
    command.apply_env_options()
    command.apply_options("mdstore flower", list(arguments))
    options = command.options
    if not (options.unix_socket or _is_loopback(options.address) or options.basic_auth or options.auth):
        raise ConfigurationError(
            key="--address",
            value=options.address,
            expected="127.0.0.1; an address that others can reach needs a password: FLOWER_BASIC_AUTH=user:password",
        )
    app = app or create_app(settings)
    app.listen_as(name)
    sys.exit(app.start(["flower", *arguments]))


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
