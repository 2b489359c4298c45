"""Demonstrates the main job on real data: load 28,426 airports, then apply the 722 changes of half a year.

The demo starts its own stack on free ports, and runs the same commands as a user would. The data passes through S3, SQS, Celery
and DynamoDB. At the end, the demo compares the SHA-256 of the final records with the SHA-256 of the package's own data after
these changes. Exit code 0 means that everything was as expected.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import airportsdata

from mdstore.local.stack import Stack

CHANGES = Path(__file__).with_name("airport-changes-20260315-20260905.jsonl")
EXPECTED = "58aa7e6374e9eeb7515032e12fcb2a95eba60d42a18455f247521f698a309bce"
LOAD, CHANGE = "demo/airports-20260315", "demo/changes-20260905"


def write_airports(path: Path) -> int:
    """Write one insert operation per airport, and return the number of airports. Floats without a fraction become integers."""
    airports = airportsdata.load("ICAO")
    with path.open("w", encoding="utf-8") as file:
        for key, airport in airports.items():
            data = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in airport.items()}
            operation = {"op": "insert", "entity": "airport", "key": key, "data": data}
            file.write(json.dumps(operation, ensure_ascii=False) + "\n")
    return len(airports)


def digest(export: Path) -> tuple[int, str]:
    """Return the number of records, and the SHA-256 of `{"airport": {key: data}}` as compact UTF-8 JSON with sorted keys."""
    records = {}
    with export.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            records[record["key"]] = record["data"]
    text = json.dumps({"airport": records}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return len(records), hashlib.sha256(text.encode()).hexdigest()


def applied(stack: Stack, request: str) -> dict[str, int]:
    """Return how many operations of each op a request applied."""
    command = [sys.executable, "-m", "mdstore", "status", request, "--json"]
    done = subprocess.run(command, env=stack.environ, check=True, capture_output=True)  # noqa: S603
    counts: dict[str, int] = json.loads(done.stdout)["applied_by_op"]
    return counts


def main() -> int:
    """Run the demo, and return the exit code."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mdstore-demo-") as directory:
        work = Path(directory)
        airports, export = work / "airports.jsonl", work / "export.jsonl"
        count = write_airports(airports)
        print(f"{count:,} airports of airportsdata {airportsdata.__version__}; starting the stack", flush=True)
        with Stack(log_dir=work, report=print) as stack:

            def mdstore(*arguments: str) -> None:
                print(f"\n$ mdstore {' '.join(arguments)}", flush=True)
                subprocess.run([sys.executable, "-m", "mdstore", *arguments], env=stack.environ, check=True)  # noqa: S603

            try:
                mdstore("load", os.fspath(airports), "--request-id", LOAD, "--source", "demo")
                mdstore("load", os.path.relpath(CHANGES), "--request-id", CHANGE, "--source", "demo")
                mdstore("verify", LOAD)
                mdstore("verify", CHANGE)
                mdstore("get", "airport", "EDDB")
                mdstore("export", "--entity", "airport", "--out", os.fspath(export))
                loaded, changed = (applied(stack, request) for request in (LOAD, CHANGE))
                memory = stack.aws.memory()
            except subprocess.CalledProcessError as error:
                print(f"{error}\n{(work / 'worker.log').read_text(errors='replace')[-5000:]}", file=sys.stderr)
                return 1
        records, found = digest(export)
        print(f"\nloaded     {loaded['insert']:,}")
        print(f"changed    {changed['insert']} inserted / {changed['update']} updated / {changed['delete']} deleted")
        print(f"found      {records:,} records, SHA-256 {found}")
        print(f"expected   28,298 records, SHA-256 {EXPECTED}: {'equal' if found == EXPECTED else 'DIFFERENT'}")
        print(
            f"memory     the embedded AWS held it in {memory / 2**20:.0f} MB, {memory / records / 1000:.0f} KB a record"
        )
        print("           it is for trying out: see docs/embedded-aws.md for what it keeps, and what to use for more")
        print(f"{time.monotonic() - began:.0f} s in total; the stack is stopped")
        return 0 if found == EXPECTED else 1


if __name__ == "__main__":
    sys.exit(main())
