"""What is recorded of a plain Celery app: messages of every kind, results, chords in every state, delayed messages."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import chain, chord, group

from tests.compat.corpus import SHOP_NODE, Environment
from tests.compat.post import NOT_NOW, Post, execute
from tests.compat.shop import BIG, BROKEN, fifo, shop_app
from tests.waiting import until

_NAMES = uuid.UUID("00000000-0000-0000-0000-000000000000")
LARGE = "z" * 250_000  # a message larger than the threshold of the claim check
TEXT_ID = "half/0"  # a task's id that is no UUID
BULKY = "w" * 20_000  # a callback that does not stand in its chord's item


def ident(name: str) -> str:
    """Make a fixed id from a name."""
    return str(uuid.uuid5(_NAMES, name))


class ShopScenes:
    """Plays messages, chords and results up to a state.

    `replays` says which messages are delivered together, and by task id what their results are then; `results` what can be
    read without any worker.
    """

    def __init__(self, environment: Environment, post: Post, url: str) -> None:
        self._environment = environment
        self._post = post
        self._app = shop_app(environment.settings_with(AWS_ENDPOINT_URL=url))
        self._app.set_current()
        self._queue = environment.settings.queue
        self.broadcasts: dict[str, str] = {}
        self.replays: dict[str, dict[str, Any]] = {}
        self.results: dict[str, Any] = {}
        self.delayed: dict[str, Any] = {}
        self.groups: dict[str, list[Any]] = {}
        self.fired: dict[str, str] = {}

    def play(self) -> None:
        """Play all scenes."""
        self._play_messages()
        self._play_canvases()
        self._play_open_chords()
        self._play_complete_chords()
        self._play_results()
        self._play_delayed()
        self._play_broadcasts()
        self._play_dead_letter()

    def _s(self, task: str, name: str, *args: Any, immutable: bool = False, **kwargs: Any) -> Any:
        signature = self._app.tasks[f"shop.{task}"].s(*args, **kwargs).set(task_id=ident(name))
        return signature.set(immutable=True) if immutable else signature

    def _replay(self, name: str, results: dict[str, Any], *messages: str) -> None:
        """Note what `messages`, one named `name` if none is given, come to: results by the names of the tasks."""
        found = {ident(task): value for task, value in results.items()}
        self.replays[name] = {"messages": list(messages or [name]), "results": found}

    # -- messages

    def _play_messages(self) -> None:
        """Single messages, each with one of the things that a message can have."""
        signatures: list[tuple[str, Any, dict[str, Any], Any]] = [
            ("arguments", self._s("add", "arguments", 2, 3), {}, 5),
            (
                "keywords",
                self._s("seen", "keywords", "\u00e9\u202e", None, size=12345678901234567890, nested={"k": [True, 1.5]}),
                {},
                [["\u00e9\u202e", None], {"size": 12345678901234567890, "nested": {"k": [True, 1.5]}}],
            ),
            ("countdown", self._s("add", "countdown", 1, 1), {"countdown": 1}, 2),
            ("limits", self._s("add", "limits", 4, 4), {"time_limit": 60, "soft_time_limit": 50}, 8),
            ("fair", self._s("add", "fair", 5, 5), {"MessageGroupId": "erp"}, 10),
            ("claim", self._s("size", "claim", LARGE), {}, len(LARGE)),
        ]
        for name, signature, options, value in signatures:
            signature.apply_async(**options)
            self._post.one(name)
            self._replay(name, {name: value})

        self._s("add", "in order", 6, 6).apply_async(queue=fifo(self._queue))
        self._post.one("in order", queue=fifo(self._queue))
        self._replay("in order", {"in order": 12})

        self._s("add", "linked", 1, 2).apply_async(link=self._s("seen", "link"), link_error=self._s("seen", "unused"))
        self._post.one("linked")
        self._replay("linked", {"linked": 3, "link": [[3], {}]})

        errback = self._s("size", "errback", "called", immutable=True)
        self._s("fail", "failing", "on purpose").apply_async(link_error=errback)
        self._post.one("failing")
        self._replay("failing", {"failing": {"error": "ValueError", "args": ["on purpose", 3]}, "errback": 6})

        self._s("again", "again").apply_async()
        execute(self._app, self._post.one())
        self._post.one("again")
        self._replay("again", {"again": 1})

        self._s("add", "expired", 1, 1).apply_async(expires=1)
        self._post.one("expired")
        self._replay("expired", {"expired": {"state": "REVOKED"}})

    def _play_canvases(self) -> None:
        """A chain and a group."""
        chain(self._s("add", "chain 0", 1, 2), self._s("add", "chain 1", 10), self._s("seen", "chain 2"),
              app=self._app).apply_async()  # fmt: skip
        self._post.one("chain")
        self._replay("chain", {"chain 0": 3, "chain 1": 13, "chain 2": [[13], {}]})

        group([self._s("add", f"group {n}", n, n) for n in range(3)], app=self._app).apply_async(task_id=ident("group"))
        names = [f"group {n}" for n in range(3)]
        self._keep(self._post.tasks(3), *names)
        self._replay("group", {name: 2 * n for n, name in enumerate(names)}, *names)

    # -- chords

    def _play_open_chords(self) -> None:
        """Chords that lack parts, whose messages are kept."""
        self._publish(
            "untouched", 3, [self._s("add", f"untouched {n}", n, 1) for n in range(3)], self._s("total", "untouched")
        )
        parts = [f"untouched {n}" for n in range(3)]
        self._replay("untouched", {"untouched": 6}, *parts)

        header = [self._s("add", "half 0", 0, 1).set(task_id=TEXT_ID), self._s("add", "half 1", 1, 1)]
        sent = self._publish("half", 2, header, self._s("total", "half"), kept=["half 1"])
        execute(self._app, sent[TEXT_ID])
        self._replay("half", {"half": 3}, "half 1")

        for policy, value in (
            ("all", {"error": "ChordError"}),
            ("any", [[[3]], {}]),
            ("always", [[[_failure("always 0"), 3]], {}]),
        ):
            header = [self._s("fail", f"{policy} 0", "on purpose"), self._s("add", f"{policy} 1", 1, 2)]
            sent = self._publish(policy, 2, header, self._s("seen", policy).set(join=policy), kept=[f"{policy} 1"])
            execute(self._app, sent[ident(f"{policy} 0")])
            self._replay(policy, {policy: value}, f"{policy} 1")

        pair = group([self._s("add", "nested 0", 1, 1), self._s("add", "nested 1", 2, 2)], app=self._app)
        sent = self._publish(
            "nested", 3, [pair, self._s("add", "nested 2", 3, 3)], self._s("seen", "nested"), kept=["nested 1"]
        )
        for name in ("nested 0", "nested 2"):
            execute(self._app, sent[ident(name)])
        self._replay("nested", {"nested": [[[4, 2, 6]], {}]}, "nested 1")

        sent = self._publish("bulky", 2, [self._s("add", f"bulky {n}", n, 1) for n in range(2)],
                             self._s("seen", "bulky", text=BULKY), kept=["bulky 1"])  # fmt: skip
        execute(self._app, sent[ident("bulky 0")])
        self._replay("bulky", {"bulky": [[[1, 2]], {"text": BULKY}]}, "bulky 1")

        sent = self._publish(
            "added", 2, [self._s("more", "added 0", 1), self._s("add", "added 1", 5, 5)], self._s("total", "added")
        )
        for letter in sent.values():
            execute(self._app, letter)
        self._post.one("added later")
        self._replay("added", {"added": 112}, "added later")

        sent = self._publish("sharded", 201, [self._s("quiet", f"sharded {n}", n) for n in range(201)],
                             self._s("add", "sharded", 3, 4, immutable=True), kept=["sharded 150"])  # fmt: skip
        sent.pop(ident("sharded 150"))
        for letter in sent.values():
            execute(self._app, letter)
        self._replay("sharded", {"sharded": 7}, "sharded 150")

        branch = chain(self._s("add", "uneven root", 1, 1), group([self._s("add", f"uneven {n}", n) for n in range(2)]))
        sent = self._publish(
            "uneven", 2, [branch, self._s("add", "uneven 2", 5, 5)], self._s("seen", "uneven"), kept=[]
        )
        for letter in sent.values():
            execute(self._app, letter)
        sent = self._post.tasks(2)
        execute(self._app, sent[ident("uneven 1")])
        self._keep(sent, "uneven 0")
        self._replay("uneven", {"uneven": [[[[2, 3], 10]], {}]}, "uneven 0")

    def _play_complete_chords(self) -> None:
        """Chords whose parts have all returned: not fired, fired, and fired in vain."""
        header = [self._s("add", f"unfired {n}", n, 1) for n in range(2)]
        sent = self._publish("unfired", 2, header, self._s("total", "unfired"))
        execute(self._app, sent[ident("unfired 0")])
        with self._post.refusing("SendMessageBatch", NOT_NOW):
            execute(self._app, sent[ident("unfired 1")])
        self.replays["unfired"] = {"messages": [], "results": {ident("unfired"): 3}}

        header = [self._s("add", f"fired {n}", n, 1) for n in range(2)]
        sent = self._publish("fired", 2, header, self._s("total", "fired"), kept=["fired 1"])
        for letter in sent.values():
            execute(self._app, letter)
        execute(self._app, self._post.one())
        self.fired = {"message": "fired 1", "part": ident("fired 1"), "body": ident("fired")}

        header = [self._s("brittle", "vain 0", 1), self._s("brittle", "vain 1", 2)]
        sent = self._publish("vain", 2, header, self._s("total", "vain"), kept=["vain 0"])
        execute(self._app, sent[ident("vain 1")])
        with _broken():
            execute(self._app, sent[ident("vain 0")])
        self._replay("vain", {"vain": 3}, "vain 0")

    def _publish(
        self, name: str, count: int, header: Any, body: Any, *, kept: list[str] | None = None
    ) -> dict[str, Any]:
        """Publish a chord of `count` parts; returns their messages by task id, and keeps those named, or all there are."""
        chord(header, body, app=self._app).set(task_id=ident(f"{name} group")).apply_async(task_id=ident(name))
        sent = self._post.tasks(count)
        names = [f"{name} {n}" for n in range(count)] if kept is None else kept
        self._keep(sent, *names)
        return sent

    def _keep(self, sent: dict[str, Any], *names: str) -> None:
        self._post.kept |= {name: sent[ident(name)] for name in names}

    # -- results

    def _play_results(self) -> None:
        """Results of tasks that were executed, and of a group that was saved."""
        for signature, value in (
            (self._s("add", "a number", 20, 1), 21),
            (self._s("seen", "a structure", "\u00e9", {"k": None}), [["\u00e9", {"k": None}], {}]),
            (self._s("big", "a large text"), "x" * BIG),
            (self._s("fail", "a failure", "no"), {"error": "ValueError", "args": ["no", 3]}),
        ):
            signature.apply_async()
            execute(self._app, self._post.one())
            self.results[signature.options["task_id"]] = value
        self.results |= {
            ident("again"): {"state": "RETRY"},
            TEXT_ID: 1,
            ident("unfired 1"): 2,
            ident("fired"): 3,
            ident("vain"): {"error": "ChordError"},
            ident("untouched"): {"state": "PENDING"},
        }
        result = group([self._s("add", f"saved {n}", n, n) for n in range(2)], app=self._app).apply_async(
            task_id=ident("saved")
        )
        result.save(backend=self._app.backend)
        for letter in self._post.tasks(2).values():
            execute(self._app, letter)
        self.groups[ident("saved")] = [0, 2]

    # -- delayed messages

    def _play_delayed(self) -> None:
        """Messages that are due in half an hour, which is past when they are replayed, and one that is due in a year."""
        self._s("add", "delayed", 7, 7).apply_async(countdown=1_800)
        self._s("add", "delayed in order", 8, 8).apply_async(countdown=1_800, queue=fifo(self._queue))
        self._s("add", "in a year", 9, 9).apply_async(countdown=365 * 86_400)
        self.delayed = {
            "moved": {ident("delayed"): 14, ident("delayed in order"): 16},
            "kept": ident("in a year"),
        }

    # -- what a worker's main process writes

    def _play_broadcasts(self) -> None:
        """A command that asks for an answer, and an event."""
        with self._listening(self._environment.settings.control_topic) as heard:
            self._app.control.broadcast("ping", destination=[SHOP_NODE], reply=True, timeout=1)
            self.broadcasts["command"] = heard()
        with self._listening(self._environment.settings.events_topic) as heard:
            dispatcher = self._app.events.Dispatcher(self._app.connection_for_write(), hostname=SHOP_NODE)
            dispatcher.send("task-succeeded", uuid=ident("an event"), result="5", runtime=0.25)
            dispatcher.close()
            self.broadcasts["events"] = heard()

    @contextmanager
    def _listening(self, topic: str) -> Iterator[Any]:
        sqs, sns = self._environment.sqs, self._environment.sns
        name = f"{topic}-recorder"
        url = sqs.create_queue(QueueName=name)["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        raw = {"RawMessageDelivery": "true"}
        topic_arn = self._environment.topic(topic)
        joined = sns.subscribe(
            TopicArn=topic_arn, Protocol="sqs", Endpoint=arn, Attributes=raw, ReturnSubscriptionArn=True
        )
        try:
            yield lambda: self._environment.receive(name)[0].body
        finally:
            sns.unsubscribe(SubscriptionArn=joined["SubscriptionArn"])
            sqs.delete_queue(QueueUrl=url)

    def _play_dead_letter(self) -> None:
        """A message that a real worker's task rejects; the worker also looks through the due-time table meanwhile."""
        self._s("fragile", "fragile", 42).apply_async()
        with self._environment.shop_worker(**{BROKEN: "1"}):
            self._post.one("dead letter", queue=self._environment.settings.dead_letter_queue)
            until(self._has_looked, what="the worker has looked through the due-time table")
        self._replay("dead letter", {"fragile": 42})

    def _has_looked(self) -> bool:
        (state,) = [item for item in self._environment.items("due") if item["pk"]["S"] == "drain"]
        return sum(name.startswith("first#") for name in state) == 8


def _failure(name: str) -> dict[str, Any]:
    """What a chord's body is given of a part that failed."""
    error = {"exc_type": "ValueError", "exc_message": ["on purpose", 3], "exc_module": "builtins"}
    return {"task_id": ident(name), "status": "FAILURE", **error}


@contextmanager
def _broken() -> Iterator[None]:
    os.environ[BROKEN] = "1"
    try:
        yield
    finally:
        del os.environ[BROKEN]
