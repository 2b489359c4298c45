"""A producer as a process of its own: `python -m benchmarks.producer FILE`.

For each request id that it reads, it submits the file as `mdstore load` does, and writes the CPU seconds of that, and its own
peak memory so far in MB, as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path

from mdstore.client import Client


def main(file: Path) -> None:
    """Submit once to warm up, then the file as often as asked."""
    client = Client()
    client.submit([{"op": "upsert", "entity": "warm", "key": "up", "data": {}}], request_id=f"warm-up/{uuid.uuid4()}")
    for line in sys.stdin:
        cpu = time.process_time()
        with file.open("rb") as lines:
            client.submit(lines, request_id=line.strip())
        print(json.dumps({"cpu": time.process_time() - cpu, "peak_mb": peak_mb("self")}), flush=True)


def peak_mb(process: int | str) -> float:
    """A process's peak memory. `ru_maxrss` would be its parent's where that was larger."""
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
