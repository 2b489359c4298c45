"""Draws one plot per benchmark from its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results import Result

_OURS, _PEER, _FLOOR, _INK = "#1f6feb", "#b8c0cc", "#4d5866", "#24292f"
mpl.rcParams.update({
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _PEER,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "mdstore",
})  # fmt: skip


def draw(result: Result, directory: Path) -> Path:
    """Write the plot as `{name}.png`, and return its path."""
    figure = _DRAWN[result.name](result)
    path = directory / f"{result.name}.png"
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    return path


def _colour(name: str) -> str:
    if "floor" in name or "bare" in name:
        return _FLOOR
    return _OURS if "mdstore" in name else _PEER


def _bars(axes: Any, names: list[str], values: list[float], shown: Callable[[float], str]) -> None:
    bars = axes.barh(names[::-1], values[::-1], color=[_colour(name) for name in names[::-1]], height=0.66)
    axes.bar_label(bars, labels=[shown(value) for value in values[::-1]], padding=3)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.14)


def _write_path(result: Result) -> Figure:
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    rows = [row for row in result.rows if row["target"] == "0 ms"]
    order = ["worker: mdstore", "worker: boto3"]
    order += [row["contender"] for row in sorted(rows, key=lambda row: row["cpu_us"]) if row["contender"] not in order]
    cpu = {row["contender"]: row["cpu_us"] for row in rows}
    _bars(left, order, [cpu[name] for name in order], lambda value: f"{value:.3g} µs")
    left.set_title("CPU per operation, with a stand-in that answers at once", loc="left", fontsize=9)
    targets = list(dict.fromkeys(row["target"] for row in result.rows))[:-1]
    for name, colour in (("worker: mdstore", _OURS), ("worker: boto3", _PEER)):
        rates = [
            next(r["operations_per_s"] for r in result.rows if (r["target"], r["contender"]) == (target, name))
            for target in targets
        ]
        right.plot(targets, rates, marker="o", color=colour)
        right.annotate(name, (0, rates[0]), textcoords="offset points", xytext=(0, 9))
        for at, rate in enumerate(rates):
            right.annotate(
                f"{rate:,}", (at, rate), textcoords="offset points", xytext=(0, -15), ha="center", fontsize=8
            )
    right.set_yscale("log")
    right.minorticks_off()
    right.set_yticks([1_000, 3_000, 10_000, 30_000, 100_000])
    right.set_ylim(1_000, 120_000)
    right.set_xlim(-0.3, len(targets) - 0.7)
    right.set_title("Operations/s of one worker process", loc="left", fontsize=9)
    right.set_xlabel("latency of a transaction")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    right.grid(axis="y", color="#e6e9ee")
    return figure


def _pipeline(result: Result) -> Figure:
    figure = Figure(figsize=(7.2, 2.3), layout="constrained")
    axes = figure.subplots()
    names = [row["contender"] for row in result.rows]
    _bars(axes, names, [row["operations_per_s"] for row in result.rows], lambda value: f"{value:,.0f}")
    axes.set_title(
        "Operations/s from submission to completion, embedded AWS, two worker processes", loc="left", fontsize=9
    )
    return figure


def _latency(result: Result) -> Figure:
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for row, shade in zip(result.rows[:5], ("#39424e", "#4d5866", "#616d7c", "#4d5866", "#39424e"), strict=True):
        axes.barh(["bare calls"], [row["p50_ms"]], left=start, color=shade, height=0.6)
        name = row["what"].replace(" ", "\n")
        is_narrow = row["p50_ms"] < result.rows[5]["p50_ms"] / 12
        axes.text(
            start + row["p50_ms"] / 2,
            0,
            name,
            ha="center",
            va="center",
            fontsize=7,
            color="white",
            rotation=90 * is_narrow,
        )
        start += row["p50_ms"]
    axes.text(start, 0, f"  {result.rows[5]['p50_ms']:.1f} ms", va="center")
    for at, (name, row) in enumerate(zip(("applied", "known"), result.rows[6:], strict=True), 1):
        axes.barh([f"mdstore, {name}"], [row["p50_ms"]], color=_OURS, height=0.6)
        axes.text(row["p50_ms"], at, f"  {row['p50_ms']:.1f} ms", va="center")
    axes.set_title(
        "One operation: from submit until it is applied, and until the submitter knows (p50)", loc="left", fontsize=9
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.14)
    return figure


def _growth(result: Result) -> Figure:
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [row["operations"] for row in result.rows]
    for axes, unit, title in (
        (left, "cpu_us", "CPU per operation, µs"),
        (right, "peak_mb", "Peak memory of a process, MB"),
    ):
        for who, colour in (("worker", _OURS), ("producer", _FLOOR)):
            axes.plot(sizes, [row[f"{who}_{unit}"] for row in result.rows], marker="o", color=colour, label=who)
        axes.legend(frameon=False)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("operations in one request")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(axis="y", color="#e6e9ee")
    return figure


def _pools(result: Result) -> Figure:
    figure = Figure(figsize=(10.5, 2.5), layout="constrained")
    latency = max(row["latency_ms"] for row in result.rows)
    rows = [row for row in result.rows if row["latency_ms"] == latency]
    names = [f"{row['pool']} {row['size']}, {row['in_flight']} in flight" for row in rows]
    for axes, column, title in zip(
        figure.subplots(1, 3),
        ("small_requests_per_s", "large_operations_per_s", "large_cpu_us"),
        (f"Small requests/s at {latency} ms", "Operations/s of a large one", "CPU per operation, µs"),
        strict=True,
    ):
        _bars(
            axes,
            names,
            [row[column] for row in rows],
            lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
        )
        axes.set_title(title, loc="left", fontsize=9)
    return figure


def _broker(result: Result) -> Figure:
    figure = Figure(figsize=(8.4, 1.7), layout="constrained")
    names = [row["contender"] for row in result.rows]
    for axes, column, title in zip(
        figure.subplots(1, 3),
        ("tasks_per_s", "calls_per_task", "publish_s"),
        ("Tasks/s, 10 ms per call", "SQS calls per task", "Seconds to publish 1,000"),
        strict=True,
    ):
        _bars(axes, names, [row[column] for row in result.rows], lambda value: f"{value:,.3g}")
        axes.set_title(title, loc="left", fontsize=9)
    return figure


def _soak(result: Result) -> Figure:
    figure = Figure(figsize=(7.2, 2.3), layout="constrained")
    axes = figure.subplots()
    tasks = [row["tasks"] for row in result.rows]
    for column, label, colour in (("main_mb", "main process", _OURS), ("child_mb", "largest child", _FLOOR)):
        axes.plot(tasks, [row[column] for row in result.rows], marker="o", color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.set_xlabel("tasks done")
    axes.set_title("Memory of a worker, MB", loc="left", fontsize=9)
    axes.grid(axis="y", color="#e6e9ee")
    return figure


def _small(result: Result) -> Figure:
    figure = Figure(figsize=(9.6, 2.4), layout="constrained")
    accepted, applied, price = figure.subplots(1, 3)
    for axes, column, title in (
        (accepted, "accepted_per_s", "Requests accepted per second"),
        (applied, "applied_per_s", "Requests applied per second"),
    ):
        names = [row["contender"] for row in result.rows]
        _bars(axes, names, [row[column] for row in result.rows], lambda value: f"{value:,.0f}")
        axes.set_title(title, loc="left", fontsize=9)
    costs = result.tables["Costs of a request"]
    dollars = [row["dollars_per_million"] for row in costs]
    _bars(price, [row["contender"] for row in costs], dollars, lambda value: f"${value:.2f}")
    price.set_title("Price of a million requests", loc="left", fontsize=9)
    return figure


_DRAWN: dict[str, Callable[[Result], Figure]] = {
    "write_path": _write_path,
    "pipeline": _pipeline,
    "latency": _latency,
    "growth": _growth,
    "pools": _pools,
    "broker": _broker,
    "small": _small,
    "soak": _soak,
}
