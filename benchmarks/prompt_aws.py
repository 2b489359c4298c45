"""A ministack whose long polls return as soon as a message arrives, as on AWS: `python -m benchmarks.prompt_aws`.

An unchanged ministack checks for messages ten times a second. That would add about 50 ms to every measured latency.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from ministack.app import main
from ministack.services import sqs

_CHECK_INTERVAL = 0.002  # seconds


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(min(seconds, _CHECK_INTERVAL))


if __name__ == "__main__":
    sqs.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": _sleep})
    main()
