"""The loader and each worker process handle a file of 100,000 operations in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mdstore.local.stack import Stack
from tests.processes import peak_memory

OPERATIONS = 100_000
LIMIT = 300 * 2**20  # bytes


@pytest.mark.timeout(600)
def test_a_hundred_thousand_operations_stay_under_300_mb(tmp_path: Path) -> None:
    """The loader and every process of the worker peak under 300 MB while they load one file of 100,000 operations."""
    file = tmp_path / "many.jsonl"
    with file.open("w") as out:
        for n in range(OPERATIONS):
            data = {
                "name": f"record number {n}",
                "n": n,
                "ratio": n / 7,
                "tags": ["a", "b", str(n % 97)],
                "text": "x" * 90,
            }
            out.write(json.dumps({"op": "insert", "entity": "many", "key": f"k{n:07d}", "data": data}) + "\n")
    with Stack(log_dir=tmp_path, with_api=False, environ={"MDSTORE_WAIT_TIME": "1"}) as stack:
        worker = psutil.Process(stack.processes["worker"].pid)
        with (tmp_path / "load.json").open("wb") as out_file:
            loader = subprocess.Popen(
                [sys.executable, "-m", "mdstore", "load", str(file), "--json"], env=stack.environ, stdout=out_file
            )
        loader_peak = 0
        while loader.poll() is None:
            loader_peak = max(loader_peak, peak_memory(loader.pid))
            time.sleep(0.05)
        worker_peaks = {process.pid: peak_memory(process.pid) for process in [worker, *worker.children(recursive=True)]}

    summary = json.loads((tmp_path / "load.json").read_text())
    print(f"loader {loader_peak / 2**20:.0f} MB, workers {[round(p / 2**20) for p in worker_peaks.values()]} MB")
    assert (loader.returncode, summary["applied"]) == (0, OPERATIONS)
    assert 0 < loader_peak < LIMIT
    assert len(worker_peaks) >= 3, "the worker's main process and its children"
    assert all(0 < value < LIMIT for value in worker_peaks.values())
