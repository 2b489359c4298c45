"""Sends requests again that a killed embedded AWS has lost.

It writes S3 objects at once, and all other state every few seconds. So after a kill there are payloads of accepted requests
whose messages, and perhaps ledger items, are gone.
"""

from __future__ import annotations

import time

from mdstore.client import Client
from mdstore.errors import IntegrityError
from mdstore.model import MAX_AGE, Reference, State


def resend_lost_requests(client: Client) -> int:
    """Send each request again that has a payload and has not begun, in the order of acceptance; return their number.

    A request whose message is not lost takes effect once all the same.
    """
    store = client.store
    prefix = store.settings.payload_prefix
    pages = store.aws.s3.get_paginator("list_objects_v2").paginate(Bucket=store.settings.bucket, Prefix=prefix)
    ids = [found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", [])]
    begun = _begun(client, ids)
    lost: list[tuple[int, Reference, int]] = []
    for payload_id in ids:
        if payload_id in begun:
            continue
        try:
            reference, header = store.payloads.find(payload_id)
        except IntegrityError:  # an object that is no payload
            continue
        batched = [request.request_id for request in header.requests]
        waiting = set(batched or [payload_id]) - _begun(client, batched)
        if waiting and time.time() - header.created_at < MAX_AGE and not header.is_follow_up:
            lost.append((header.created_at, reference, len(waiting)))
    for _, reference, _ in sorted(lost, key=lambda one: (one[0], one[1].request_id)):
        client.ingest.publish(reference)
    return sum(count for _, _, count in lost)


def _begun(client: Client, request_ids: list[str]) -> set[str]:
    """Return the ids of the requests that a worker has begun."""
    found = client.store.ledger.get_many(request_ids).items()
    return {request_id for request_id, request in found if request.state is not State.ACCEPTED}
