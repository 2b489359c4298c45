"""Structured log events: one a transition, on the logger `mdstore.events`; `docs/states.md` lists them all."""

from __future__ import annotations

import logging

logger = logging.getLogger("mdstore.events")


def event(name: str, *, level: int = logging.INFO, **fields: str | int | float) -> None:
    """Log `name` with its fields, as text (`name key=value ...`) and, for structured handlers, as the record's `mdstore`."""
    if logger.isEnabledFor(level):
        text = " ".join(f"{key}={value}" for key, value in fields.items())
        logger.log(level, "%s %s", name, text, extra={"mdstore": {"event": name, **fields}})
