"""Flower, as a process: the web page of https://flower.readthedocs.io over SNS and SQS.

Nothing of Flower or Celery is patched: the transport knows the event exchange by its name, and gives its listener the one
queue `{events_topic}-{name}`, which a restarted Flower finds again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from mdstore.errors import ConfigurationError
from mdstore.queue.app import create_app
from mdstore.settings import Settings

#: Flower's options, where they are not given: its own way, the environment (`FLOWER_...`), its file or the command line.
DEFAULTS = {
    "address": "127.0.0.1",
    "inspect_timeout": 4_000.0,  # ms: an answer takes the way through SNS and two queues
    "enable_events": False,  # workers send them anyway; it would be a command to all of them every 5 s
}


def run(settings: Settings, arguments: Sequence[str], *, name: str = "flower") -> None:
    """Serve until it is stopped. Two Flowers of one namespace need two names: each event goes to one reader of a queue.

    Raises `ConfigurationError` where Flower is not installed, or would be open to the network without a password.
    """
    if not settings.events or not settings.remote_control:
        key = "remote_control" if settings.events else "events"
        raise ConfigurationError(key=key, value=False, expected="true: Flower shows nothing without it")
    try:
        from flower import command  # noqa: PLC0415  an extra
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
            expected="127.0.0.1, or a password for an address that others reach: FLOWER_BASIC_AUTH=user:password",
        )
    create_app(settings, event_queue=name).start(["flower", *arguments])


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
