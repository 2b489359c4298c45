"""The deaths that a worker is to die, in their order: each once, whichever of its processes comes there first."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

import msgspec

Moment = Literal["before", "after"]


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """The death of a process at a step, right `before` or `after` it, when it comes there for the `nth` time.

    With `group` its whole process group dies, by SIGKILL; else the process alone, which is then a child of the pool.
    """

    step: str
    moment: Moment
    group: bool
    nth: int = 1
    mark: str = ""


class FaultSchedule:
    """The kills that are to come, one after the other."""

    def __init__(self, kills: list[Kill]) -> None:
        self._kills = kills
        self._passed = 0

    def at(self, step: str, moment: Moment) -> None:
        """Die here, if it is the place."""
        kill = next((kill for kill in self._kills if not Path(kill.mark).exists()), None)
        if kill is None or (kill.step, kill.moment) != (step, moment):
            return
        self._passed += 1
        if self._passed < kill.nth:
            return
        try:
            Path(kill.mark).touch(exist_ok=False)
        except FileExistsError:  # another process of the pool was faster
            return
        if kill.group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
