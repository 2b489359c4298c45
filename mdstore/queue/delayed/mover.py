"""The worker's step that moves delayed messages from their table to their queues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mdstore.aws.sqs import Entry, is_fifo
from mdstore.errors import MdstoreError
from mdstore.log import event
from mdstore.queue.broker.ascii_json import escaped
from mdstore.queue.delayed.table import INTERVAL, DelayedMessage
from mdstore.queue.worker.periodic import PeriodicStep


class MoverStep(PeriodicStep):
    """Moves delayed messages every 10 seconds or so. Every worker runs this step; a lease on each shard divides the work."""

    work_name = "due"
    interval = INTERVAL

    def work(self, stopping: Callable[[], bool]) -> bool:
        """Move the messages that are due to be moved. End before the next batch once `stopping` is true."""
        moved: int = self.app.delayed_table.move(self._send, stopping=stopping)
        return moved > 0

    def _send(self, batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
        """Publish a batch of one queue, and dead-letter what SQS will never accept. Return the messages that are safe."""
        sqs, queue = self.app.aws.queues, batch[0].queue
        in_order = is_fifo(queue)
        entries = [
            Entry(
                message_body=escaped(message.body),  # release 0.1.0 stored characters that SQS refuses
                delay_seconds=message.delay_seconds,
                message_group_id=message.group_id,
                message_deduplication_id=message.deduplication_id if in_order else None,
            )
            for message in batch
        ]
        safe = []
        for message, failed in zip(batch, sqs.send(sqs.url(queue), entries, in_order=in_order), strict=True):
            if failed is None or (
                failed.is_refused and self._dead_letter(message, f"delayed message for {queue}: {failed}")
            ):
                safe.append(message)
        return safe

    def _dead_letter(self, message: DelayedMessage, reason: str) -> bool:
        """Dead-letter a message, and return whether that succeeded.

        Raising an error here would cause the rest of the batch to be sent again.
        """
        try:
            self.app.dead_letter(body=message.body, reason=reason, task="", receives=0)
        except MdstoreError as error:
            event("due.kept", level=logging.ERROR, queue=message.queue, messages=1, error=f"{reason}: {error}")
            return False
        return True
