"""Marking this process's queues: what fails is tried again."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mdstore.aws.clients import AwsClients
from mdstore.errors import Unavailable
from mdstore.local.emulator import free_port
from mdstore.queue.control.reaper import Reaper
from mdstore.queue.control.topics import Topics
from mdstore.settings import load_settings


@pytest.mark.parametrize("call", ["last_seen", "discard"])
def test_an_aws_that_does_not_answer_is_unavailable(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # botocore tries six times all the same; only its pauses, of up to 20 s each, are left out.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    settings = load_settings({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}).settings
    aws = AwsClients(settings)
    monkeypatch.setattr(aws.queues, "url", lambda name: f"{settings.endpoint_url}/000000000000/{name}")
    topics = Topics(settings, lambda: aws)
    with pytest.raises(Unavailable, match=r"tags of|delete"):
        topics.last_seen("mdstore-control-node-x") if call == "last_seen" else topics.discard(
            "mdstore-control-node-x", None
        )


def test_a_queue_is_marked_whatever_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reaper that ended would have its own queues taken for left over."""
    monkeypatch.setattr("mdstore.queue.control.reaper.time.sleep", lambda _: None)
    marked = threading.Semaphore(0)
    errors: list[Exception] = [OSError("a fault"), Unavailable("down", code="Down")]
    over = threading.Event()

    class Marked:
        def mark_alive(self, _queue: str) -> None:
            if errors:
                raise errors.pop()
            marked.release()
            over.wait()

    topics: Any = Marked()
    Reaper(topics).register("mine")
    assert marked.acquire(timeout=10)
