"""Readiness is checked once for all callers who ask at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import anyio
import pytest

from mdstore.api import health
from mdstore.store import Store


def test_many_callers_cost_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 callers share one check of each part, and its answer counts for a second."""
    now, asked, is_broken = 100.0, 0, False

    def check(_: Any) -> None:
        nonlocal asked
        asked += 1
        time.sleep(0.05)  # others ask meanwhile
        if is_broken:
            raise OSError

    async def ask(callers: int) -> list[list[str]]:
        threads = anyio.CapacityLimiter(4)
        answers: list[list[str]] = []

        async def one() -> None:
            answers.append(await readiness.failing(cast("Store", None), threads))

        async with anyio.create_task_group() as group:
            for _ in range(callers):
                group.start_soon(one)
        return answers

    async def scene() -> None:
        nonlocal now, is_broken
        assert await ask(400) == [[]] * 400
        is_broken = True
        now += health.FRESH - 0.01
        assert await ask(1) == [[]]
        assert asked == 1
        now += 0.02
        assert await ask(400) == [["part"]] * 400
        assert asked == 2

    monkeypatch.setattr(health, "_PARTS", {"part": check})
    readiness = health.Readiness(clock=lambda: now)
    with ThreadPoolExecutor(1) as thread:  # a browser test of this process may have an event loop in its own
        thread.submit(anyio.run, scene).result()
