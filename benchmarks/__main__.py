"""`python -m benchmarks [NAME ...] [--json] [--quick] [--runs N] [--out DIR]`: run all benchmarks, or those named."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import broker, growth, latency, pipeline, pools, soak, write_path
from benchmarks.plots import draw
from benchmarks.results import Result, load

BENCHMARKS: dict[str, Callable[..., Result]] = {
    "write_path": write_path.run,
    "pipeline": pipeline.run,
    "latency": latency.run,
    "growth": growth.run,
    "pools": pools.run,
    "broker": broker.run,
    "soak": soak.run,
}
RESULTS = Path("benchmarks/results")


def main() -> None:
    """Run and print; results and plots are written to `--out`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="one small run each: shows that all of it works, and no more"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of which the medians are taken (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where results and plots go (default: {RESULTS})")
    arguments = parser.parse_args()
    results = []
    for name in arguments.names or BENCHMARKS:
        result = BENCHMARKS[name](runs=1 if arguments.quick else arguments.runs, scale=0.05 if arguments.quick else 1.0)
        result.save(arguments.out)
        draw(result, arguments.out)
        results.append(result)
        if not arguments.json:
            print(f"\n{name}: {result.title}\n\n{result.table()}", flush=True)
    (arguments.out / "results.md").write_text(page(arguments.out), "utf-8")
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))


def page(directory: Path) -> str:
    """All results there are in `directory`, as one page."""
    parts = ["# Results\n\nWritten by `make bench`. What each benchmark does is said in its module in `benchmarks/`.\n"]
    for name in BENCHMARKS:
        path = directory / f"{name}.json"
        if path.exists():
            parts.append(load(path).section())
    return "\n".join(parts)


if __name__ == "__main__":
    main()
