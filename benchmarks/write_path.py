"""CPU and speed of one process that writes to DynamoDB: this project's worker and client, their peers, and the floor."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.contender import Measured, contender
from benchmarks.results import Result, Row, median
from benchmarks.services import embedded_aws, environ_of, stub
from benchmarks.write_contenders import CONTENDERS
from mdstore.settings import Settings

LATENCIES = (0, 5, 20)  # milliseconds
MINISTACK = "ministack"
OPERATIONS = {MINISTACK: 2_970}  # the emulator limits the speed, so more operations would only take longer
_MANY = 9_900
#: The baselines: boto3 with as many threads as the other contenders, and with one. The one that takes less CPU counts.
BOTO3_OF = {
    "worker": ("worker: boto3", "worker: boto3, one thread"),
    "client": ("client: boto3", "client: boto3, one thread"),
}


def run(*, runs: int, scale: float) -> Result:
    """Measure all contenders against each target. Rows have `target`, `contender`, and CPU in microseconds per operation."""
    measured: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    with embedded_aws() as settings:
        for target in [*(f"{latency} ms" for latency in LATENCIES), MINISTACK]:
            operations = max(198, int(OPERATIONS.get(target, _MANY) * scale))
            with ExitStack() as stack:
                environments = _environments(target, settings, stack)
                contenders = {name: stack.enter_context(contender(name, next(environments))) for name in CONTENDERS}
                for number in range(runs + 1):
                    for name, one in contenders.items():  # in turn, so that a disturbance affects all of them
                        found = one.run(run=str(uuid.uuid4()), operations=operations)
                        if number:  # the first run warms up
                            measured[target, name].append(found)
    return Result(name="write_path", title=__doc__ or "", runs=runs, rows=_rows(measured))


def _environments(target: str, settings: Settings, stack: ExitStack) -> Iterator[dict[str, str]]:
    """Yield an environment for each contender.

    Contenders share one stub. For the target ministack, each gets an emulator of its own, because it slows down as it fills.
    """
    if target == MINISTACK:
        while True:
            yield environ_of(stack.enter_context(embedded_aws()))
    port = stack.enter_context(stub(float(target.removesuffix(" ms"))))
    while True:
        yield {**environ_of(settings), "AWS_ENDPOINT_URL_DYNAMODB": f"http://127.0.0.1:{port}"}


def _rows(measured: dict[tuple[str, str], list[Measured]]) -> list[Row]:
    rows: list[Row] = []
    for (target, name), found in measured.items():
        cpu = median([one.cpu_us for one in found])
        kind = name.partition(":")[0]
        base = min(
            median([one.cpu_us for one in measured[target, boto3]])
            for boto3 in (BOTO3_OF.get(kind) or BOTO3_OF["client"])
        )
        rows.append({
            "target": target,
            "contender": name,
            "cpu_us": round(cpu, 1),
            "operations_per_s": round(median([one.rate for one in found])),
            "times_less_cpu_than_boto3": round(base / cpu, 1),
        })  # fmt: skip
    return rows
