"""The store's app in a worker that has no memory for the first decompressions; `STARVED` names a file that counts them down."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zstandard

from mdstore.tasks import create_store_app

_left = Path(os.environ["STARVED"])
_Decompressor = zstandard.ZstdDecompressor


def _starved(**options: Any) -> Any:
    left = int(_left.read_text())
    if left:
        _left.write_text(str(left - 1))
        raise MemoryError
    return _Decompressor(**options)


vars(zstandard)["ZstdDecompressor"] = _starved  # mdstore.compression looks it up at each call
app = create_store_app()
