"""Structured log events on the logger `mdstore.events`: one event per state transition. `docs/states.md` lists them all."""

from __future__ import annotations

import logging

logger = logging.getLogger("mdstore.events")


def _shown(value: str | float) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def event(name: str, *, level: int = logging.INFO, **fields: str | int | float) -> None:
    """Log an event as text (`name key=value ...`), and as the log record's attribute `mdstore` for structured handlers."""
    if logger.isEnabledFor(level):
        # Text with a space or a line break is quoted, so that no value can be mistaken for another field or another line.
        text = " ".join(f"{key}={_shown(value)}" for key, value in fields.items())
        logger.log(level, "%s %s", name, text, extra={"mdstore": {"event": name, **fields}})
