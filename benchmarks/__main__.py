"""`python -m benchmarks [NAME ...] [--json]`: run all benchmarks, or those named."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from benchmarks import write_path

BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {"write_path": write_path.run}


def main() -> None:
    """Run and print: one table a benchmark, or one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    results = {name: BENCHMARKS[name]() for name in arguments.names or BENCHMARKS}
    if arguments.json:
        print(json.dumps(results))
        return
    for name, rows in results.items():
        print(f"\n{name}")
        for row in rows:
            print("  " + "  ".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
