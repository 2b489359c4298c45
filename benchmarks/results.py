"""The result of a benchmark: rows of medians with the machine that measured them, saved as JSON and shown as a table."""

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
    """The result of one benchmark: `rows` with the medians of `runs` runs."""

    name: str
    title: str
    runs: int
    rows: list[Row]
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
        """Return the rows as a Markdown table whose columns are aligned, so that it can be read as plain text."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        cells = [columns, *([_shown(row.get(name)) for name in columns] for row in self.rows)]
        widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in cells
        ]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return "\n".join(lines)


def load(path: Path) -> Result:
    """Read a result that `save` wrote."""
    return Result(**json.loads(path.read_text("utf-8")))


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a `share` (0 to 1) of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
