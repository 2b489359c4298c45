"""A worker's part in moving what is due from the due-time table to its queue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mdstore.aws.sqs import Entry, is_fifo
from mdstore.errors import MdstoreError
from mdstore.log import event
from mdstore.queue.delayed.table import INTERVAL, DelayedMessage
from mdstore.queue.worker.periodic import PeriodicStep


class MoverStep(PeriodicStep):
    """Every worker drains, in turns: whoever leases a shard of the table has it for a minute."""

    work_name = "due"
    interval = INTERVAL

    def work(self, stopping: Callable[[], bool]) -> bool:
        """Move what is due; ends before the next batch."""
        moved: int = self.app.delayed_table.move(self._send, stopping=stopping)
        return moved > 0

    def _send(self, batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
        """Publish; what SQS will never take is dead-lettered. Returns what is safe."""
        sqs, queue = self.app.aws.queues, batch[0].queue
        in_order = is_fifo(queue)
        entries = [
            Entry(
                message_body=one.body,
                delay_seconds=one.delay_seconds,
                message_group_id=one.group_id,
                message_deduplication_id=one.ident if in_order else None,
            )
            for one in batch
        ]
        safe = []
        for one, failed in zip(batch, sqs.send(sqs.url(queue), entries, in_order=in_order), strict=True):
            if failed is None or (failed.is_refused and self._is_buried(one, f"due for {queue}: {failed}")):
                safe.append(one)
        return safe

    def _is_buried(self, one: DelayedMessage, reason: str) -> bool:
        """Dead-letter a message; where that fails, what was sent with it must not be sent again."""
        try:
            self.app.dead_letter(body=one.body, reason=reason, task="", receives=0)
        except MdstoreError as error:
            event("due.kept", level=logging.ERROR, queue=one.queue, messages=1, error=f"{reason}: {error}")
            return False
        return True
