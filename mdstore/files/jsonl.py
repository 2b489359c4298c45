"""Reads JSON Lines files, plain or gzipped."""

from __future__ import annotations

import codecs
import gzip
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


def lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a file that are not blank. The path `-` means standard input."""
    with ExitStack() as stack:
        stream: Iterable[bytes]
        if path == "-":
            stream = sys.stdin.buffer
        elif path.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.open(path, "rb"))
        else:
            stream = stack.enter_context(Path(path).open("rb"))
        for number, line in enumerate(stream):
            stripped = line.removeprefix(codecs.BOM_UTF8).strip() if number == 0 else line.strip()
            if stripped:
                yield stripped
