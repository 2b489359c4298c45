"""The stale-queue reaper marks this process's queues, and retries what fails."""

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
def test_an_unreachable_aws_raises_unavailable(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # botocore makes six attempts as usual; only its pauses, of up to 20 s each, are left out.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    settings = load_settings({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}).settings
    aws = AwsClients(settings)
    monkeypatch.setattr(aws.queues, "url", lambda name: f"{settings.endpoint_url}/000000000000/{name}")
    topics = Topics(settings, lambda: aws)
    with pytest.raises(Unavailable, match=r"tags of|delete"):
        topics.last_seen("mdstore-control-node-x") if call == "last_seen" else topics.discard(
            "mdstore-control-node-x", None
        )


def test_a_queue_is_marked_after_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reaper ended, other processes would delete its queues as stale."""
    monkeypatch.setattr("mdstore.queue.control.reaper.time.sleep", lambda _: None)
    marked = threading.Semaphore(0)
    errors: list[Exception] = [OSError("a fault"), Unavailable("down", code="Down")]
    release = threading.Event()

    class FakeTopics:
        def mark_alive(self, _queue: str) -> None:
            if errors:
                raise errors.pop()
            marked.release()
            release.wait()

    topics: Any = FakeTopics()
    Reaper(topics).register("mine")
    assert marked.acquire(timeout=10)
