"""Structured log events: one a transition, on the logger `mdstore.events`; `docs/states.md` lists them all."""

from __future__ import annotations

import logging

logger = logging.getLogger("mdstore.events")


def _shown(value: str | float) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def event(name: str, *, level: int = logging.INFO, **fields: str | int | float) -> None:
    """Log `name` with its fields, as text (`name key=value ...`) and, for structured handlers, as the record's `mdstore`."""
    if logger.isEnabledFor(level):
        # A text that holds a space or a line break is quoted, so that no value can pass for a field, or for a line.
        text = " ".join(f"{key}={_shown(value)}" for key, value in fields.items())
        logger.log(level, "%s %s", name, text, extra={"mdstore": {"event": name, **fields}})
