"""The result of a benchmark: rows of medians with the machine that measured them, saved as JSON and shown as tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one benchmark: `rows` with the medians of `runs` runs, and further `tables` of such rows by heading."""

    name: str
    title: str
    runs: int
    rows: list[Row]
    tables: dict[str, list[Row]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=_machine)

    def save(self, directory: Path) -> None:
        """Write `{name}.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    def section(self) -> str:
        """Return the result as a Markdown section with its plot."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        medians = f"Medians of {self.runs} runs; {machine}."
        picture = f"![{self.name}]({self.name}.png)"
        return f"## {self.name}\n\n{self.title.strip()}\n\n{medians}\n\n{picture}\n\n{self.table()}\n"

    def table(self) -> str:
        """Return the rows and the further tables as Markdown tables."""
        return "\n\n".join(
            [_table(self.rows), *(f"### {name}\n\n{_table(rows)}" for name, rows in self.tables.items())]
        )


def load(path: Path) -> Result:
    """Read a result that `save` wrote."""
    return Result(**json.loads(path.read_text("utf-8")))


def medians(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the medians of the numbers of rows that several runs measured in the same order."""
    return [
        {
            column: value if isinstance(value, str) else _rounded(median([row[column] for row in same]))
            for column, value in same[0].items()
        }
        for same in zip(*runs, strict=True)
    ]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a `share` (0 to 1) of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _rounded(value: float) -> float:
    """Return a number with three digits, or as an integer if it is one or has more."""
    return round(value) if abs(value) >= 100 or value == int(value) else float(f"{value:.3g}")


def _table(rows: Sequence[Row]) -> str:
    """Return a Markdown table whose columns are aligned, so that it can be read as plain text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_shown(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
