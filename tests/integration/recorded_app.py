"""The data store's app in a worker that records its first calls of the functions in `CALLS_OF` to the file `CALLS`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mdstore.tasks import create_store_app
from tests.write_path import record

app = create_store_app()
record(Path(os.environ["CALLS"]), json.loads(os.environ["CALLS_OF"]))
