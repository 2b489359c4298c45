"""The functions that `docs/write-path.md` lists, and a recorder of which of them a process calls, in which order."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "write-path.md").read_text("utf-8")
_NAME = r"`(mdstore/[\w/]+\.py:[A-Za-z_][\w.]*)`"


def named() -> list[str]:
    """Every `path/to/file.py:Qualified.name` on the page."""
    return sorted(set(re.findall(_NAME, PAGE)))


def hops(heading: str) -> list[str]:
    """The functions in the tables of one section, in the order of the rows."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^\| \d+ \| {_NAME} \|", section, re.MULTILINE)


def resolve(name: str) -> Any:
    """What a `path/to/file.py:Qualified.name` names. Raises `ModuleNotFoundError` or `AttributeError`."""
    path, _, qualified = name.partition(":")
    found: Any = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part)
    return found


def record(path: Path, names: list[str]) -> None:
    """Append each of `names` to a file when this process, or a child forked from this thread, first calls it."""
    codes: dict[CodeType, str] = {inspect.unwrap(resolve(name)).__code__: name for name in names}
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes and (name := codes.pop(frame.f_code, None)):
            os.write(output, f"{name}\n".encode())

    threading.setprofile(on_event)
    sys.setprofile(on_event)


@contextmanager
def recorded(path: Path, names: list[str]) -> Iterator[None]:
    """Record as `record` does, inside of the context."""
    record(path, names)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def first_calls(path: Path) -> list[str]:
    """The recorded names in the order of their first calls, whichever process made them."""
    return list(dict.fromkeys(path.read_text("utf-8").splitlines()))
