"""Requests one after the other, compared with the sum of boto3's bare calls as in the benchmark `latency`."""

from __future__ import annotations

import os
from unittest import mock

from benchmarks import latency
from benchmarks.alone import alone
from benchmarks.results import Row
from benchmarks.services import environ_of, memory_aws
from benchmarks.small.rates import LATENCY_MS


def rows(count: int) -> list[Row]:
    """Measure."""
    return alone(_measure, count)


def _measure(count: int) -> list[Row]:
    with memory_aws(LATENCY_MS) as settings, mock.patch.dict(os.environ, environ_of(settings)):
        found = latency.measure(settings, count)
    return latency.rows_of({name: [values] for name, values in found.items()})
