"""Run all benchmarks, or the named ones: `python -m benchmarks [NAME ...] [--json] [--quick] [--runs N] [--out DIR]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import broker, growth, latency, pipeline, pools, small, soak, write_path
from benchmarks.plots import draw
from benchmarks.results import Result, load

BENCHMARKS: dict[str, Callable[..., Result]] = {
    "write_path": write_path.run,
    "pipeline": pipeline.run,
    "latency": latency.run,
    "growth": growth.run,
    "pools": pools.run,
    "broker": broker.run,
    "small": small.run,
    "soak": soak.run,
}
RESULTS = Path("benchmarks/results")


def main() -> None:
    """Run the benchmarks, print their results, and write results and plots to `--out`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run all benchmarks, or the named ones.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="one small run of each benchmark: shows only that everything works"
    )
    parser.add_argument("--runs", type=int, default=5, help="number of runs; results are medians (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"directory for results and plots (default: {RESULTS})"
    )
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
    """Return all results in `directory` as one Markdown page."""
    parts = [
        "# Results\n\n`make bench` wrote this page. Each benchmark's module in `benchmarks/` describes what it measures.\n"
    ]
    for name in BENCHMARKS:
        path = directory / f"{name}.json"
        if path.exists():
            parts.append(load(path).section())
    return "\n".join(parts)


if __name__ == "__main__":
    main()
