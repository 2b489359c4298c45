"""CPU and speed of one process that writes: this project's worker and client, their peers, and the floor."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.contender import Measured, contender
from benchmarks.results import Result, Row, median
from benchmarks.services import embedded_aws, environ_of, stub
from benchmarks.write_contenders import CONTENDERS
from mdstore.settings import Settings

LATENCIES = (0, 5, 20)  # milliseconds
MINISTACK = "ministack"
OPERATIONS = {MINISTACK: 2_970}  # the emulator is the bound: more would only take longer
_MANY = 9_900


def run(*, runs: int, scale: float) -> Result:
    """Measure all contenders against each target; rows have `target` and `contender`, CPU in microseconds an operation."""
    measured: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    with embedded_aws() as settings:
        for target in [*(f"{latency} ms" for latency in LATENCIES), MINISTACK]:
            operations = max(198, int(OPERATIONS.get(target, _MANY) * scale))
            with _target(target, settings) as endpoint, ExitStack() as stack:
                environ = {**environ_of(settings), "AWS_ENDPOINT_URL_DYNAMODB": endpoint}
                entered = {name: stack.enter_context(contender(name, environ)) for name in CONTENDERS}
                for number in range(runs + 1):
                    for name, one in entered.items():  # side by side: what disturbs one run disturbs all
                        found = one.run(run=str(uuid.uuid4()), operations=operations)
                        if number:  # the first run warms up
                            measured[target, name].append(found)
    return Result(name="write_path", title=__doc__ or "", runs=runs, rows=_rows(measured))


@contextmanager
def _target(target: str, settings: Settings) -> Iterator[str]:
    if target == MINISTACK:
        yield str(settings.endpoint_url)
        return
    with stub(float(target.removesuffix(" ms"))) as port:
        yield f"http://127.0.0.1:{port}"


def _rows(measured: dict[tuple[str, str], list[Measured]]) -> list[Row]:
    rows: list[Row] = []
    for (target, name), found in measured.items():
        cpu = median([one.cpu_us for one in found])
        kind = name.partition(":")[0]
        base = measured.get((target, f"{kind}: boto3"), measured[target, "client: boto3"])
        rows.append({
            "target": target,
            "contender": name,
            "cpu_us": round(cpu, 1),
            "operations_per_s": round(median([one.rate for one in found])),
            "times_less_cpu_than_boto3": round(median([one.cpu_us for one in base]) / cpu, 1),
        })  # fmt: skip
    return rows
