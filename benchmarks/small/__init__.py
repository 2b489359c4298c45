"""Requests of one operation each, with 10 ms per call to AWS: this project, its peers, and twenty lines of boto3 (`seed-like`).

The first tables' producers submit all requests before two worker processes start. `accepted_per_s` is the rate of the producer,
`applied_per_s` that of the workers, without their start. *One by one*: each of 32 clients is a `Client` of its own, so that
nothing joins their requests. *In batches*: 64 threads share a `Client`. Stock Celery pauses for 20 ms between polls, and its
task does what `seed-like` does; taskiq has the operation in its message, and stores a result in S3 instead. Calls and write
units are per request, from submission to deletion; `dollars_per_million` is their price in us-east-1 (S3 Standard, SQS standard
queue, DynamoDB on demand), as listed in `benchmarks.small.counts`.

Calls over HTTP come from 32 or 64 connections that are kept open, out of a process of their own. CPU is that of all processes
of the HTTP API and of the worker, including what they need while they wait. A lone request is compared with the sum of boto3's
bare calls, as in the benchmark *latency*. AWS is a stand-in in memory (`benchmarks.memory_aws`), because an emulator would be
slower than the contenders; only *Applied on ministack* uses the emulator, without added latency. The last table has the speed
of the stand-in itself: calls per second, and per second of its process's CPU.
"""

from __future__ import annotations

from collections import defaultdict

from benchmarks.results import Result, Row, medians
from benchmarks.small import accepting, bulk, lone, rates, stand_in, together

_REQUESTS = 1_000
_HTTP_REQUESTS = 3_000
_LONE_REQUESTS = 100
_UPLOAD = 64 * 2**20  # bytes: as large a body as the HTTP API accepts
_CALLS = 10_000
_QUICK = 0.1  # below this scale, a run is a quick one
RATES, COSTS, ACCEPTED = "rates", "Costs of a request", "Accepted over HTTP"
APPLIED, CPU, LONE = "Applied on ministack", "CPU of the HTTP API and the worker", "A lone request"
BULK, STAND_IN = "Beside a large upload", "The stand-in for AWS"
#: Tables, their columns, the rows to which ratios are taken, and the new column's name.
_RATIOS = (
    (RATES, "applied_per_s", rates.SEED_LIKE, "times_seed_like"),
    (ACCEPTED, "accepted_per_s", accepting.PARSE, "of_parse_and_answer"),
    (ACCEPTED, "accepted_per_s", accepting.SEED_LIKE, "times_seed_like"),
    (APPLIED, "applied_per_s", rates.SEED_LIKE, "times_seed_like"),
)


def run(*, runs: int, scale: float) -> Result:
    """Measure. The rows have the rates of all contenders; the further tables have their headings."""
    found: dict[str, list[list[Row]]] = defaultdict(list)
    for _ in range(runs):
        for table, rows in _measure(scale).items():
            found[table].append(rows)
    tables = {name: medians(rows) for name, rows in found.items()}
    for table, column, base, name in _RATIOS:
        if table in tables:
            (divisor,) = (row[column] for row in tables[table] if base in row.values())
            for row in tables[table]:
                row[name] = round(row[column] / divisor, 2)
    return Result(name="small", title=__doc__ or "", runs=runs, rows=tables.pop(RATES), tables=tables)


def _measure(scale: float) -> dict[str, list[Row]]:
    def scaled(count: int, least: int) -> int:
        return max(least, int(count * scale))

    # A run that only shows that the benchmark works takes the parts that start the fewest processes.
    is_quick = scale < _QUICK
    names = (rates.SEED_LIKE, rates.IN_BATCHES) if is_quick else rates.CONTENDERS
    contenders, costs = rates.rows(names, scaled(_REQUESTS, 60))
    requests = scaled(_HTTP_REQUESTS, 100)
    cpu, cost = together.cpu(requests)
    found = {
        RATES: contenders,
        COSTS: [*costs, cost],
        ACCEPTED: accepting.rows(requests),
        CPU: cpu,
        STAND_IN: stand_in.rows(scaled(_CALLS, 1_000)),
    }
    if is_quick:
        return found
    return found | {
        APPLIED: together.rates(requests),
        LONE: lone.rows(scaled(_LONE_REQUESTS, 10)),
        BULK: bulk.rows(scaled(_UPLOAD, 2**20)),
    }
