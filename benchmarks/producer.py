"""A producer in a process of its own: `python -m benchmarks.producer FILE`.

For each request id on standard input, it submits the file as `mdstore load` does. It then writes a line of JSON with the CPU
seconds of this submission and the process's peak memory so far in MB.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path

from mdstore.client import Client


def main(file: Path) -> None:
    """Submit one operation to warm up, then submit the file once for each line of standard input."""
    client = Client()
    client.submit([{"op": "upsert", "entity": "warm", "key": "up", "data": {}}], request_id=f"warm-up/{uuid.uuid4()}")
    for line in sys.stdin:
        cpu = time.process_time()
        with file.open("rb") as lines:
            client.submit(lines, request_id=line.strip())
        print(json.dumps({"cpu": time.process_time() - cpu, "peak_mb": peak_mb("self")}), flush=True)


def peak_mb(process: int | str) -> float:
    """Return a process's peak memory in MB. `ru_maxrss` would be that of the parent process if the parent's was larger."""
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
