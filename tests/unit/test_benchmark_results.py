"""Results of benchmarks are medians, are shown as tables, and are read as they were written."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Result, load, medians


def test_numbers_are_medians_with_three_digits_and_texts_stay() -> None:
    """Each row is the median of the runs' rows at the same place; large and whole numbers are integers."""
    runs = [
        [{"contender": "a", "per_s": per_s, "p50_ms": p50}, {"contender": "b", "per_s": 1.04, "p50_ms": 32}]
        for per_s, p50 in ((99_999.0, 0.001), (1234.56, 1.23456), (0.5, 9.0))
    ]
    assert medians(runs) == [
        {"contender": "a", "per_s": 1235, "p50_ms": 1.23},
        {"contender": "b", "per_s": 1.04, "p50_ms": 32},
    ]


def test_further_tables_have_headings_and_columns_of_their_own(tmp_path: Path) -> None:
    """A column that a row lacks is empty. The saved result shows the same."""
    result = Result(
        name="small",
        title="What it measures.",
        runs=1,
        rows=[{"contender": "a", "per_s": 1_000}],
        tables={"Latency": [{"what": "a", "p50_ms": 1.5}, {"what": "b", "p50_ms": 2.5, "ratio": 1.7}]},
    )
    assert result.table() == (
        "| contender | per_s |\n"
        "| --------- | ----- |\n"
        "| a         | 1,000 |\n"
        "\n"
        "### Latency\n"
        "\n"
        "| what | p50_ms | ratio |\n"
        "| ---- | ------ | ----- |\n"
        "| a    | 1.5    |       |\n"
        "| b    | 2.5    | 1.7   |"
    )
    result.save(tmp_path)
    assert load(tmp_path / "small.json") == result
