"""taskiq with taskiq-aio-sqs: batched sends, one message per 100 operations, results in S3."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import Any

from aiobotocore.session import get_session
from taskiq import Context, TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq_aio_sqs import S3Backend, SQSBroker

from benchmarks.peers import writing

_CLIENT_OPTIONS: dict[str, Any] = {
    "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
    "region_name": os.environ["AWS_REGION"],
    "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
    "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
}

broker = SQSBroker(
    writing.QUEUE,
    wait_time_seconds=1,
    max_number_of_messages=10,
    enable_batching=True,
    batch_timeout=0.1,
    **_CLIENT_OPTIONS,
).with_result_backend(S3Backend(bucket_name="bench-results", **_CLIENT_OPTIONS))


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def _connect(state: TaskiqState) -> None:
    state.stack = AsyncExitStack()
    state.dynamodb = await state.stack.enter_async_context(get_session().create_client("dynamodb", **_CLIENT_OPTIONS))


@broker.task
async def apply(operations: list[dict[str, Any]], context: Context = TaskiqDepends()) -> int:  # noqa: B008  taskiq's idiom
    """Apply the operations in one transaction."""
    await context.state.dynamodb.transact_write_items(TransactItems=writing.actions(operations))
    return len(operations)


async def _submit(operations: list[dict[str, Any]]) -> int:
    await broker.startup()
    try:
        chunks = [operations[start : start + writing.CHUNK] for start in range(0, len(operations), writing.CHUNK)]
        sent = await asyncio.gather(*(apply.kiq(chunk) for chunk in chunks))
        # Wait for one result at a time, because each wait reads S3 five times a second.
        results = [await one.wait_result(check_interval=writing.INTERVAL, timeout=600) for one in sent]
        return sum(result.return_value for result in results)
    finally:
        await broker.shutdown()


def submit(operations: list[dict[str, Any]]) -> int:
    """Send all operations, wait, and return the number of applied operations."""
    return asyncio.run(_submit(operations))
