"""ministack whose long polls answer as AWS's do, when a message arrives: `python -m benchmarks.prompt_aws`.

ministack looks for messages ten times a second, which would hide every latency behind 50 ms of its own.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from ministack.app import main
from ministack.services import sqs

_LOOK_EVERY = 0.002  # seconds


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(min(seconds, _LOOK_EVERY))


if __name__ == "__main__":
    sqs.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": _sleep})
    main()
