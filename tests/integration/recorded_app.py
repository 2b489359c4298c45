"""The data store's app. Its worker records the first call of each function in `CALLS_OF` (JSON) to the file `CALLS`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mdstore.tasks import create_store_app
from tests.write_path import record

app = create_store_app()
record(Path(os.environ["CALLS"]), json.loads(os.environ["CALLS_OF"]))
