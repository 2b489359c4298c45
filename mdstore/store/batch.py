"""Batches: payloads that hold several small requests of one source.

A batch is stored and sent like one request. Its lane holds the operations of all its requests, in the order in which the
requests arrived. So they are packed into the same transactions; but each operation belongs to its own request, which has its
own outcomes, counts and state. Groups never reach across requests.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence

from mdstore.model import SCHEMA_VERSION, BatchedRequest, Counts
from mdstore.store.ledger_items import Receipt
from mdstore.store.packing import Transaction
from mdstore.store.payload import Encoded, Header
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.sections import SectionBuilder, assembled, spill_file

_PREFIX = "batch/"
#: The largest request that joins a batch, in operations and in bytes of its lines. A larger one has a payload of its own.
MAX_OPERATIONS, MAX_BYTES = 100, 2**18
#: The largest batch: in requests, in operations, and in bytes of its lines.
MAX_BATCH_REQUESTS, MAX_BATCH_OPERATIONS, MAX_BATCH_BYTES = 500, 1_000, 4 * 2**20


def new_batch_id() -> str:
    """Return the id of a new batch. It is the `request_id` of its payload and of its message."""
    return f"{_PREFIX}{uuid.uuid4()}"


def is_batch_id(request_id: str) -> bool:
    """Return whether an id looks like that of a batch. Only the payload tells whether it is one."""
    return request_id.startswith(_PREFIX)


def is_small(builder: PayloadBuilder) -> bool:
    """Return whether a request is small enough for a batch."""
    return builder.count <= MAX_OPERATIONS and builder.raw <= MAX_BYTES


def encode_batch(
    batch_id: str, source: str, requests: Sequence[tuple[str, PayloadBuilder]], *, created_at: int, models: str
) -> Encoded:
    """Encode requests, given as their ids and operations, as one payload. Its user must close the body.

    Stored under the id of another batch, a batch of no requests keeps that one from ever being stored.
    """
    lane, refused = SectionBuilder(), SectionBuilder()
    entries: list[BatchedRequest] = []
    refused_counts: Counter[str] = Counter()
    first = 0
    for number, (request_id, builder) in enumerate(requests):
        builder.join(lane, refused, first=first, number=number)
        entry = BatchedRequest(
            request_id=request_id,
            content=builder.content,
            first=first,
            operations=builder.count,
            refused_counts=builder.refused_counts,
        )
        entries.append(entry)
        refused_counts.update(entry.refused_counts)
        first += builder.count
    with spill_file() as body:
        header = Header(
            v=SCHEMA_VERSION,
            codec="zstd",
            request_id=batch_id,
            source=source,
            content="",
            created_at=created_at,
            operations=first,
            lanes=(lane.write_to(body),) if lane.count else (),
            refused=refused.write_to(body),
            refused_counts=dict(sorted(refused_counts.items())),
            models=models,
            requests=tuple(entries),
        )
        return assembled(header, body)


def counts_by_request(
    header: Header, transactions: Sequence[Transaction], receipts: Mapping[int, Receipt]
) -> list[Counts]:
    """Count the outcomes of each request of a batch. Operations of a transaction without a receipt count as failed."""
    firsts = [request.first for request in header.requests]
    applied: list[Counter[str]] = [Counter() for _ in firsts]
    reasons = [Counter(request.refused_counts) for request in header.requests]
    for transaction in transactions:
        receipt = receipts.get(transaction.number)
        if receipt is None:
            continue
        refused = {one.index for one in receipt.refused}
        for one in receipt.refused:
            reasons[bisect_right(firsts, one.index) - 1][str(one.reason)] += 1
        for item in transaction.operations:
            if item.index not in refused:
                applied[bisect_right(firsts, item.index) - 1][item.op] += 1
    return [
        Counts(
            applied=dict(sorted(done.items())),
            refused=dict(sorted(why.items())),
            failed=request.operations - done.total() - why.total(),
        )
        for request, done, why in zip(header.requests, applied, reasons, strict=True)
    ]
