"""A forger who may only send messages to the store's queue cannot have anything written, dropped or executed.

A real worker receives each forged message between genuine requests. It dead-letters the message with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import signature

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws
from mdstore.model import State
from mdstore.settings import load_settings
from tests.dead_letters import receive_dead_letters
from tests.integration.test_queue import namespace, worker
from tests.waiting import until

EVIL = "evil"
PAST = "2001-01-01T00:00:00+00:00"
OPERATION = {"op": "upsert", "entity": EVIL, "key": "k", "data": {"by": "the forger"}}
Json = dict[str, Any]


@dataclass
class Target:
    """A store with one worker, and what a forger may do to it: send texts to the queue."""

    client: Client
    log: Path
    letters: list[Json] = field(default_factory=list)

    def send(self, *messages: Json) -> None:
        """Send forged messages."""
        for message in messages:
            self.send_text(json.dumps(message))

    def send_text(self, text: str) -> None:
        """Send a text as it is."""
        sqs = self.client.store.aws.sqs
        url = sqs.get_queue_url(QueueName=self.client.settings.queue)["QueueUrl"]
        sqs.send_message(QueueUrl=url, MessageBody=text)

    def reason_for(self, mark: str) -> str:
        """Wait for the dead letter whose body has a text, and return its reason."""

        def found() -> list[Json]:
            sqs, settings = self.client.store.aws.sqs, self.client.settings
            self.letters += receive_dead_letters(sqs, settings.dead_letter_queue)
            return [letter for letter in self.letters if mark in letter["body"]]

        return str(until(found, within=40, what=f"a dead letter with {mark}")[0]["reason"])


@pytest.fixture(scope="module")
def target(aws: EmbeddedAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Yield a store whose worker runs."""
    environ = namespace(aws, with_store=True)
    log = tmp_path_factory.mktemp("forger") / "worker.log"
    with worker(environ, log):
        yield Target(Client(load_settings(environ).settings), log)


def message(task: str, *args: Any, kwargs: Json | None = None, canvas: Json | None = None, **headers: Any) -> Json:
    """Return a task's message as the forger writes it."""
    task_id = headers.setdefault("id", str(uuid4()))
    return {
        "body": json.dumps([list(args), kwargs or {}, canvas or {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": task, "lang": "py", "root_id": task_id, **headers},
        "properties": {"delivery_tag": "tag", "correlation_id": task_id},
    }


def follow_up(task: str = "mdstore.ingest", *args: Any, **fields: Any) -> Json:
    """Return a signature that would have the worker store operations as those of another source."""
    found = signature(
        task, args=args or ([OPERATION],), kwargs={"source": "erp"} if not args else {}, immutable=True, app=None
    )
    return {**json.loads(json.dumps(found)), **fields}


def nothing_happened(target: Target) -> None:
    """Assert that the worker still works, and that no operation of the forger was stored."""
    after = target.client.submit([{**OPERATION, "entity": "good", "key": str(uuid4())}])
    assert after.wait(timeout=60).status().counts.applied == {"upsert": 1}
    assert [record.key for record in target.client.export(EVIL)] == []


WAYS: dict[str, Callable[[], Json]] = {
    "callbacks": lambda: message("celery.accumulate", 1, canvas={"callbacks": [follow_up()]}),
    "chain": lambda: message("celery.accumulate", 1, canvas={"chain": [follow_up()]}),
    "errbacks of a failing task": lambda: message("celery.chain", canvas={"errbacks": [follow_up()]}),
    "errbacks of an unknown task": lambda: message("nobody", canvas={"errbacks": [follow_up()]}),
    "a group": lambda: message("celery.group", [follow_up()], [str(uuid4()), []], str(uuid4()), []),
    "a chord's body": lambda: message("celery.chord", [], follow_up()),
    "a part's chord": lambda: message(
        "celery.accumulate", 1, canvas={"chord": follow_up()}, group=str(uuid4()), group_index=0
    ),
    "errbacks of a message that is refused": lambda: message(
        "mdstore.ingest", {}, canvas={"errbacks": [follow_up()]}, retries="x"
    ),
    "a chain in a follow-up": lambda: message(
        "nobody", canvas={"errbacks": [follow_up("nobody", 1, options={"chain": [follow_up()]})]}
    ),
    "a group in a follow-up": lambda: message(
        "nobody", canvas={"errbacks": [follow_up("celery.group", 1, kwargs={"tasks": [follow_up()]}, subtask_type="group")]}
    ),
    "a follow-up that takes a result": lambda: message(
        "celery.accumulate", OPERATION, canvas={"chain": [{**follow_up(), "args": [], "immutable": False}]}
    ),
    "a lane as a follow-up": lambda: message("nobody", canvas={"errbacks": [follow_up("mdstore.apply_lane", [OPERATION], 0)]}),
    "chord_unlock": lambda: message(
        "celery.chord_unlock", str(uuid4()), follow_up(), kwargs={"max_retries": None, "interval": 1, "result": []}
    ),
    "a map": lambda: message("celery.map", follow_up(), [[OPERATION]]),
    "a starmap": lambda: message("celery.starmap", follow_up(), [[[OPERATION]]]),
    "chunks": lambda: message("celery.chunks", follow_up(), [[[OPERATION]]], 1),
    "backend_cleanup": lambda: message("celery.backend_cleanup"),
    "operations as arguments": lambda: message("mdstore.ingest", [OPERATION]),
    "a reference to nothing": lambda: message(
        "mdstore.ingest",
        {"v": 1, "request_id": "x", "payload": "payloads/x", "digest": str(uuid4()), "lanes": 1, "source": "erp"},
    ),
    "a finish": lambda: message(
        "mdstore.finish",
        {"v": 1, "request_id": "x", "payload": "payloads/x", "digest": str(uuid4()), "lanes": 9, "source": "erp"},
    ),
    "a claim to nothing": lambda: {
        "mdstore-claim": 1, "digest": f"{uuid4().int:064x}"[-64:], "size": 9, "days": 45, "stored": "2026-11-01",
        "task": "mdstore.ingest", "id": str(uuid4()),
    },
    "a line break in an id": lambda: message("mdstore.ingest", {}, id=f"{uuid4()}\n[INFO] forged"),
    "a line break in a name": lambda: message("mdstore.ingest", {}, shadow=f"{uuid4()}\u2028[INFO] forged"),
}  # fmt: skip


def mark_of(sent: Json) -> str:
    """Return a text that only the dead letter of this message has."""
    found: Any = sent.get("digest") or sent["headers"]["id"].split("\n")[0]
    if sent.get("headers", {}).get("task", "").startswith("mdstore.") and '"digest"' in sent["body"]:
        found = json.loads(sent["body"])[0][0]["digest"]
    return str(found)


@pytest.mark.parametrize("way", WAYS)
def test_a_forged_message_is_dead_lettered_and_has_no_effect(target: Target, way: str) -> None:
    sent = WAYS[way]()
    if way == "operations as arguments":
        sent["headers"]["retries"] = 0
        target.send(sent)
        assert "not a message of this schema" in target.reason_for('"the forger"}}]}')
    else:
        target.send(sent)
        assert target.reason_for(mark_of(sent)) not in ("", "unknown")
    nothing_happened(target)


def test_follow_ups_of_a_genuine_message_reach_the_store_only_by_reference(target: Target) -> None:
    """A forger who has seen a reference, too, cannot add operations to its message."""
    accepted = target.client.submit([{**OPERATION, "entity": "good"}], request_id=str(uuid4())).wait(timeout=60)
    found, _ = target.client.store.payloads.find(accepted.request_id)
    reference = json.loads(json.dumps(found, default=_builtins))
    sent = message("mdstore.ingest", reference, canvas={"callbacks": [follow_up()]})
    target.send(sent)
    assert "mdstore.ingest" in target.reason_for(mark_of({**sent, "body": "[]"}))
    nothing_happened(target)


def _builtins(value: Any) -> Any:
    return {name: getattr(value, name) for name in value.__struct_fields__}


@pytest.mark.parametrize(
    "forged",
    [
        lambda request_id: message("mdstore.ingest", {"of": request_id}, id=request_id, expires=PAST),
        lambda request_id: message("celery.accumulate", {"applied": 999}, kwargs={"index": 0}, id=request_id, expires=PAST),
        lambda request_id: message("celery.accumulate", {"applied": 999}, kwargs={"index": 0}, id=request_id),
        lambda request_id: message("nobody", id=request_id),
        lambda request_id: message("nobody", canvas={"chain": [follow_up("nobody", 1, options={"task_id": request_id})]}),
        lambda request_id: message("mdstore.ingest", {}, id=request_id, retries="x"),
        lambda request_id: {
            "mdstore-claim": 1, "digest": f"{uuid4().int:064x}"[-64:], "size": 9, "days": 45, "stored": "2026-11-01",
            "task": "mdstore.ingest", "id": request_id,
        },
    ],
    ids=["expired", "expired built-in", "false result", "unknown", "in a chain", "refused", "claim"],
)  # fmt: skip
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_forged_message_with_a_request_s_id_changes_nothing_about_the_request(
    target: Target, forged: Callable[[str], Json], late: bool
) -> None:
    """Whether it comes before or after the request: the request is applied, and its own result is the result."""
    request_id = f"guessed-{uuid4()}"
    sent = forged(request_id)
    if not late:
        target.send(sent)
        assert target.reason_for(mark_of({**sent, "body": "[]"}))
    result = target.client.ingest.delay([{**OPERATION, "entity": "good", "key": request_id}], request_id=request_id)
    assert result.get(timeout=60)["applied"] == 1
    if late:
        target.send(sent)
        assert target.reason_for(mark_of({**sent, "body": "[]"}))
    assert target.client.status(request_id).state is State.COMPLETED
    assert target.client.app.AsyncResult(request_id).get(timeout=60)["applied"] == 1
    again = target.client.ingest.delay([{**OPERATION, "entity": "good", "key": request_id}], request_id=request_id)
    assert again.get(timeout=60)["applied"] == 1


def test_no_forged_line_is_in_the_log(target: Target) -> None:
    for way in ("a line break in an id", "a line break in a name"):
        sent = WAYS[way]()
        target.send(sent)
        target.reason_for(mark_of({**sent, "body": "[]"}))
    lines = target.log.read_text().splitlines()
    assert [line for line in lines if line.startswith("[INFO] forged")] == []
