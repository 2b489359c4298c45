"""Sends requests again that a killed embedded AWS has lost.

It writes S3 objects at once, and all other state every few seconds. So after a kill there are payloads of accepted requests
whose messages and ledger items are gone.
"""

from __future__ import annotations

import time

import msgspec

from mdstore.client import Client
from mdstore.errors import IntegrityError
from mdstore.model import MAX_AGE
from mdstore.tasks.ingest import fairness_options


def resend_lost_requests(client: Client) -> int:
    """Send each request again that has a payload and no item in the ledger, in the order of acceptance; return their number.

    A request whose message is not lost takes effect once all the same.
    """
    store = client.store
    prefix = store.settings.payload_prefix
    pages = store.aws.s3.get_paginator("list_objects_v2").paginate(Bucket=store.settings.bucket, Prefix=prefix)
    ids = [found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", [])]
    recorded = store.ledger.get_many(ids)
    lost = []
    for request_id in ids:
        if request_id not in recorded:
            try:
                reference, header = store.payloads.find(request_id)
            except IntegrityError:  # an object that is no payload
                continue
            if time.time() - header.created_at < MAX_AGE and not header.is_follow_up:
                lost.append((header.created_at, request_id, reference))
    for _, request_id, reference in sorted(lost, key=lambda one: one[:2]):
        message = msgspec.to_builtins(reference)
        client.ingest.apply_async((message,), task_id=request_id, **fairness_options(reference))
    return len(lost)
