"""The README and the benchmark pages quote the published results, and say which targets were missed."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import ge, le, lt
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks"
WORKER, CLIENT = {"contender": "worker: mdstore"}, {"contender": "client: mdstore"}
MDSTORE = {"contender": "mdstore"}
APPLIED = {"what": "mdstore, submit to applied"}
MILLION = {"operations": 1_000_000}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    return found


def measured(name: str, column: str, **where: Any) -> float:
    """Return the value of `column` in the one row of the result `name` whose values are those of `where`."""
    (row,) = (row for row in rows(name) if all(row[key] == value for key, value in where.items()))
    value: float = row[column]
    return value


def best_peer() -> float:
    """Return the operations a second of the fastest contender of the pipeline that is neither mdstore nor the floor."""
    rates: list[float] = [
        row["operations_per_s"] for row in rows("pipeline") if row["contender"] not in (MDSTORE["contender"], FLOOR)
    ]
    return max(rates)


def spread(column: str) -> float:
    """Return by how many per cent the largest value exceeds the smallest, from 10,000 to 1,000,000 operations."""
    values: list[float] = [row[column] for row in rows("growth") if row["operations"] >= 10_000]
    return (max(values) / min(values) - 1) * 100


FLOOR = "floor: direct transactions"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the page's table of targets: `compare(measured, target)` tells whether the target is met.

    `question` is part of the row's text, and `number_format` formats the measured number.
    """

    question: str
    measured: float
    compare: Callable[[float, float], bool]
    target: float
    number_format: str = "{:.1f}"

    @property
    def cells(self) -> list[str]:
        """Return the row's numbers, and whether the target is met."""
        answer = "yes" if self.compare(self.measured, self.target) else "**no**"
        return [f"{self.target:,g}", self.number_format.format(self.measured), answer]


def targets() -> list[Target]:
    at_once, slow = {"target": "0 ms", **WORKER}, {"target": "20 ms", **WORKER}
    return [
        Target(
            question="CPU an operation", measured=measured("write_path", "cpu_us", **at_once), compare=le, target=40
        ),
        Target(
            question="than a worker with boto3",
            measured=measured("write_path", "times_less_cpu_than_boto3", **at_once),
            compare=ge,
            target=5,
        ),
        Target(
            question="than boto3 with `TypeSerializer`",
            measured=measured("write_path", "times_less_cpu_than_boto3", target="0 ms", **CLIENT),
            compare=ge,
            target=10,
        ),
        Target(
            question="at 20 ms a transaction",
            measured=measured("write_path", "operations_per_s", **slow),
            compare=ge,
            target=15_000,
            number_format="{:,}",
        ),
        Target(
            question="of the floor",
            measured=measured("pipeline", "of_the_floor", **MDSTORE),
            compare=ge,
            target=0.8,
            number_format="{}",
        ),
        Target(
            question="as it comes",
            measured=measured("pipeline", "times_stock_celery", **MDSTORE),
            compare=ge,
            target=2.5,
            number_format="{}",
        ),
        Target(
            question="that polls without pause",
            measured=measured("pipeline", "times_polling_without_pause", **MDSTORE),
            compare=ge,
            target=2.5,
            number_format="{}",
        ),
        Target(
            question="every peer",
            measured=measured("pipeline", "operations_per_s", **MDSTORE),
            compare=ge,
            target=best_peer(),
            number_format="{:,}",
        ),
        Target(
            question="sum of the bare calls",
            measured=measured("latency", "p50_of_the_bare_calls", **APPLIED),
            compare=le,
            target=1.3,
            number_format="{}",
        ),
        *(
            Target(
                question=f"{who}'s CPU an operation",
                measured=spread(f"{who}_cpu_us"),
                compare=le,
                target=15,
                number_format="{:.0f}",
            )
            for who in ("worker", "producer")
        ),
        *(
            Target(
                question=f"{who}'s memory",
                measured=measured("growth", f"{who}_peak_mb", **MILLION),
                compare=lt,
                target=300,
                number_format="{:.0f}",
            )
            for who in ("worker", "producer")
        ),
        Target(
            question="calls a task",
            measured=measured("broker", "calls_per_task", **MDSTORE),
            compare=le,
            target=0.4,
            number_format="{}",
        ),
        Target(
            question="tasks a second",
            measured=measured("broker", "times_as_fast", **MDSTORE),
            compare=ge,
            target=3,
        ),
        Target(
            question="a group of a thousand",
            measured=measured("broker", "publish_times_as_fast", **MDSTORE),
            compare=ge,
            target=5,
        ),
    ]


NUMBER = r"\d[\d,]*(?:\.\d+)?"


def test_the_table_of_targets_quotes_the_published_results() -> None:
    """Each row has the target, the measured number and the answer that follow from the results."""
    page = (RESULTS / "README.md").read_text("utf-8")
    table = page.partition("| question | target | measured | met |\n")[2].partition("\n\n")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert len(found) == len(targets())
    for (question, target, number, met), wanted in zip(found, targets(), strict=True):
        assert wanted.question in question
        assert [*re.findall(NUMBER, target), *re.findall(NUMBER, number), met] == wanted.cells, question


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_have_the_present_titles_of_their_benchmarks(path: Path) -> None:
    """A benchmark whose description has changed since its result was published must be run again."""
    module = importlib.import_module(f"benchmarks.{path.stem}")
    assert json.loads(path.read_text("utf-8"))["title"] == module.__doc__


def test_the_readme_quotes_the_published_results() -> None:
    """The paragraph under the plot has these numbers and no others, and the plot exists."""
    _, picture, after = (ROOT / "README.md").read_text("utf-8").partition("(docs/benchmarks/write_path.png)\n\n")
    assert picture
    assert (RESULTS / "write_path.png").is_file()
    paragraph = after.partition("\n\n")[0]
    slow = {"target": "20 ms", **WORKER}
    assert re.findall(NUMBER, paragraph.replace("boto3", "")) == [
        str(measured("write_path", "cpu_us", target="0 ms", **WORKER)),
        str(measured("write_path", "times_less_cpu_than_boto3", target="0 ms", **WORKER)),
        f"{measured('write_path', 'operations_per_s', **slow):,}",
        "20",  # ms, the target of that row
        str(measured("pipeline", "times_stock_celery", **MDSTORE)),
        str(measured("pipeline", "times_polling_without_pause", **MDSTORE)),
        str(measured("pipeline", "of_the_floor", **MDSTORE)),
    ]


def test_the_decision_on_pools_quotes_the_benchmark_of_the_write_path() -> None:
    """Its first table has the worker's rows of the write path."""
    page = (ROOT / "docs" / "adr" / "0013-pool-and-parallelism.md").read_text("utf-8")
    found = re.findall(rf"^\| (\d+ ms) \| ({NUMBER}) \| ({NUMBER}) µs \|$", page, re.MULTILINE)
    assert found == [
        (row["target"], f"{row['operations_per_s']:,}", str(row["cpu_us"]))
        for row in rows("write_path")
        if row["contender"] == WORKER["contender"] and row["target"].endswith(" ms")
    ]


def test_the_page_of_the_transport_quotes_the_published_results() -> None:
    """Its table has both rows of the broker's result."""
    page = (ROOT / "docs" / "celery-on-sqs.md").read_text("utf-8")
    table = page.partition("Measured with 10,000 tasks")[2].partition("| --- | --- | --- |\n")[2].partition("\n\n")[0]
    found = [re.findall(NUMBER, line.partition("|")[2].partition("|")[2]) for line in table.splitlines()]
    stock, own = rows("broker")
    assert [row["contender"] for row in (stock, own)] == ["stock Celery", "mdstore"]
    assert found == [
        [f"{row['tasks_per_s']:.0f}" for row in (stock, own)],
        [f"{row['calls_per_task']:.3g}" for row in (stock, own)],
        [f"{row['publish_s']:.3g}" for row in (stock, own)],
    ]


def test_the_decision_on_pools_quotes_the_benchmark_of_pools() -> None:
    """Its second table has each row of the benchmark of pools."""
    page = (ROOT / "docs" / "adr" / "0013-pool-and-parallelism.md").read_text("utf-8")
    quoted = re.findall(rf"^\| (\w+ \d+, \d+) ((?:\| {NUMBER}(?: µs)? ){{6}})\|$", page, re.MULTILINE)
    found: dict[str, list[str]] = {}
    for row in rows("pools"):
        cells = [f"{row['small_requests_per_s']}", f"{row['large_operations_per_s']:,.0f}", f"{row['large_cpu_us']} µs"]
        found.setdefault(f"{row['pool']} {row['size']}, {row['in_flight']}", []).extend(cells)
    assert {name: [cell.strip() for cell in cells.split("|")[1:]] for name, cells in quoted} == found
