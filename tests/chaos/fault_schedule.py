"""When a worker's processes must die: kills in a given order, each executed once, by the first process that reaches it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

import msgspec

Moment = Literal["before", "after"]


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """A kill of a process right `before` or `after` a step, when the process reaches the step for the `nth` time.

    With `group`, SIGKILL ends its whole process group; otherwise only the process exits, which is then a pool process.
    `mark` is the file that says that the kill was executed.
    """

    step: str
    moment: Moment
    group: bool
    nth: int = 1
    mark: str = ""


class FaultSchedule:
    """Executes kills one after another."""

    def __init__(self, kills: list[Kill]) -> None:
        self._kills = kills
        self._passed = 0

    def at(self, step: str, moment: Moment) -> None:
        """End this process, or its group, if the next kill is due at this step and moment."""
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
