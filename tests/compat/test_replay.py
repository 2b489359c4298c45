"""What earlier versions wrote is read, finished and executed by the code at hand, without a migration.

Each version's corpus is loaded twice. In `kept` only TTLs are moved and nothing works on it: it is read byte for byte as it
was recorded. In `store` and `shop` all times are moved to the present, and real worker processes go on with what is half-done.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mdstore import Client, InvalidOperations, NotFound
from tests.compat.corpus import SHOP, STORE, Corpus, Environment, emulator, exact, replays, versions
from tests.compat.shop import fifo, shop_app
from tests.waiting import until

TIMEOUT = 60
KEPT = "compat-kept"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A corpus in an environment, and the clients of the code at hand."""

    corpus: Corpus
    environment: Environment
    client: Client
    app: Any

    @classmethod
    def of(cls, corpus: Corpus, environment: Environment) -> Site:
        settings = environment.settings_with()
        return cls(corpus=corpus, environment=environment, client=Client(settings), app=shop_app(settings))

    @property
    def expected(self) -> dict[str, Any]:
        return self.corpus.expected


class Sites:
    """The sites of all versions. Tests come in any order, so a site is made when asked for and lives as long as `stack`."""

    def __init__(self, stack: ExitStack, directories: pytest.TempPathFactory) -> None:
        self._stack = stack
        self._directories = directories
        self._urls: dict[Path, str] = {}
        self._made: dict[tuple[Path, str], Site] = {}

    def get(self, version: Path, namespace: str) -> Site:
        """The site of a version's namespace, with a worker for each of its queues."""
        if (version, namespace) not in self._made:
            self._made[version, namespace] = self._make(version, namespace)
        return self._made[version, namespace]

    def _make(self, version: Path, namespace: str) -> Site:
        if version not in self._urls:
            self._urls[version] = self._stack.enter_context(emulator())
        corpus = Corpus.load(version, whole=namespace != KEPT)
        environment = Environment(self._urls[version], namespace, self._directories.mktemp(namespace))
        if namespace == SHOP:
            environment.make_fifo()
        for loaded in (STORE, SHOP) if namespace == KEPT else (namespace,):
            environment.load(corpus, loaded)
        if namespace == STORE:
            self._stack.enter_context(environment.store_worker())
        if namespace == SHOP:
            self._stack.enter_context(environment.shop_worker())
            self._stack.enter_context(environment.shop_worker("fifo@compat", fifo(SHOP)))
        return Site.of(corpus, environment)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test for every version, and one test for each of a version's replays."""
    names: list[str] = ["version"]
    found: list[list[Any]] = [[path] for path in versions()]
    if "replay" in metafunc.fixturenames:
        names.append("replay")
        found = [[path, name] for (path,) in found for name in replays(path)]
    ids = ["-".join([path.name, *rest]) for path, *rest in found]
    metafunc.parametrize(names, found, ids=ids)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """The sites of all versions; their processes end with the module."""
    with ExitStack() as stack:
        yield Sites(stack, tmp_path_factory)


@pytest.fixture
def kept(sites: Sites, version: Path) -> Site:
    """Both namespaces in one, as they were recorded; nothing works on them."""
    return sites.get(version, KEPT)


@pytest.fixture
def store(sites: Sites, version: Path) -> Site:
    """The data store's namespace, with a worker of its own."""
    return sites.get(version, STORE)


@pytest.fixture
def shop(sites: Sites, version: Path) -> Site:
    """The plain app's namespace, with a worker for each of its queues."""
    return sites.get(version, SHOP)


# -- what is only read


def test_records_are_read_exactly(kept: Site) -> None:
    """Every record has its data, version and sequence: odd Unicode, 38 digits and data in S3; a tombstone is absent."""
    for expected in kept.expected["records"]:
        entity, key = expected["entity"], expected["key"]
        if expected["data"] is None:
            with pytest.raises(NotFound):
                kept.client.get(entity, key)
            continue
        record = kept.client.get(entity, key)
        assert exact(record.data) == exact(expected["data"])
        found = (record.version, record.sequence, round(record.updated_at * 1000), record.updated_by)
        assert found == tuple(expected[name] for name in ("version", "sequence", "updated_at", "updated_by"))
    names = {(record.entity, record.key) for record in kept.client.export()}
    assert names >= {(one["entity"], one["key"]) for one in kept.expected["records"] if one["data"] is not None}


def test_requests_are_read(kept: Site) -> None:
    """Each request has its state, source, lanes and counts, whether it is accepted, half-done, failed or completed."""
    for name, expected in kept.expected["requests"].items():
        if name == "stored":  # not in the ledger: its payload says how old it is
            continue
        request = kept.client.status(name)
        assert described(request) == {key: expected[key] for key in described(request)}, name
        assert round(request.accepted_at * 1000) == expected["accepted_at"], name


def test_outcomes_are_read(kept: Site) -> None:
    """Each operation has the outcome that receipts and lane summaries say, with its reason; in a half-done lane, too."""
    for name, expected in kept.expected["requests"].items():
        if name == "stored":  # not in the ledger, as above
            continue
        found = sorted([one.index, one.outcome, one.reason] for one in kept.client.outcomes(name))
        assert found == expected.get("outcomes_so_far", expected["outcomes"]), name


def test_completed_requests_are_verified(kept: Site) -> None:
    """`mdstore verify` finds no fault in what an earlier version applied."""
    for name, expected in kept.expected["requests"].items():
        if expected["state"] == "completed":
            found = kept.client.verify(name)
            assert (found.ok, found.faults) == (True, []), name
            assert (found.applied, found.refused, found.superseded) == (*expected["counts"][:2], expected["superseded"])
    ran = kept.environment.mdstore("verify", "every", "--json")
    assert (ran.returncode, json.loads(ran.stdout)["ok"]) == (0, True), ran.stderr


def test_results_are_read(kept: Site) -> None:
    """Results of tasks and requests are read in every state, also those that lie in S3, and a saved group's."""
    for task_id, expected in kept.expected["results"].items():
        assert shown(kept.app.AsyncResult(task_id), expected) == expected, task_id
    for group_id, expected in kept.expected["groups"].items():
        assert kept.app.GroupResult.restore(group_id, backend=kept.app.backend).get(timeout=TIMEOUT) == expected
    for name in ("seed", "every", "many-lanes"):
        summary = kept.client.ingest.AsyncResult(name).get(timeout=TIMEOUT)
        applied, refused, failed = kept.expected["requests"][name]["counts"]
        assert (summary["state"], summary["applied"]) == ("completed", applied)
        assert (summary["refused"], summary["failed"]) == (refused, failed)


def test_an_api_key_is_accepted(kept: Site) -> None:
    """The HTTP API takes a key that an earlier version made, as its source, and knows a request by its idempotency key."""
    key = kept.expected["key"]
    with kept.environment.front_door() as url:
        status, record = call(f"{url}/v1/records/invoice/2026/1", key)
        assert (status, record["data"], record["version"]) == (200, {"total": 12.5, "paid": False}, 1)
        assert call(f"{url}/v1/records/invoice/2026/1", key[:4] + key[:3:-1])[0] == 401
        assert call(f"{url}/v1/requests/erp:order-1", key)[1]["state"] == "completed"
        assert call(f"{url}/v1/requests/seed", key)[0] == 404  # another source's


# -- what the data store's worker goes on with


@pytest.mark.parametrize("name", ["accepted", "accepted-lanes"])
def test_an_accepted_request_is_applied(store: Site, name: str) -> None:
    """The message of a request that no worker has seen is executed, with one lane and with several."""
    store.environment.send(store.corpus.messages[STORE][f"ingest {name}"])
    check_completed(store, name)


@pytest.mark.parametrize("name", ["half-again", "failed", "stored"])
def test_an_unfinished_request_sent_again_completes(store: Site, name: str) -> None:
    """A request that is half-done, failed or never got its message is sent again: each operation takes effect once."""
    again = store.corpus.requests[name]
    expected = store.expected["requests"][name]
    before = described(store.client.status(name))
    assert before == {key: expected[key] for key in before}
    submission = store.client.submit(again["operations"], request_id=name)
    assert (submission.new, submission.sent) == (False, True)
    until(lambda: str(store.client.status(name).state) == "completed", within=TIMEOUT, what=f"{name} is completed")
    check_completed(store, name)


def test_a_half_done_chord_of_lanes_completes(store: Site) -> None:
    """The last message of a request's chord of lanes is delivered: its lane goes on after its receipts, and `finish` runs."""
    store.environment.send(store.corpus.messages[STORE]["lane 1 of half-chord"])
    check_completed(store, "half-chord")


def test_messages_that_come_again_change_nothing(store: Site) -> None:
    """Every message of requests that are completed is delivered again, and no record changes."""
    names = ("seed", "every", "order", "nonsense", "many-lanes")
    letters = [letter for name, letter in store.corpus.messages[STORE].items() if name.endswith(names)]
    assert len(letters) == 9
    store.environment.send(*letters)
    until(store.environment.is_idle, within=TIMEOUT, what="all messages are done")
    for expected in store.expected["records"]:
        if expected["data"] is not None:
            record = store.client.get(expected["entity"], expected["key"])
            assert (record.version, record.updated_by) == (expected["version"], expected["updated_by"])
    for name in ("seed", "every", "erp:order-1", "nonsense", "many-lanes"):
        assert store.client.verify(name).ok, name


def test_a_completed_request_sent_again_is_known(store: Site) -> None:
    """The same operations under the same id are the same request to the code at hand: nothing is sent."""
    # `every` has another size limit, and `seed` an attribute with an empty name, which only the recorder's emulator took.
    for name, again in store.corpus.requests.items():
        if store.expected["requests"][name]["state"] == "completed" and name not in ("every", "seed"):
            options = {key: value for key, value in again.items() if key != "operations"}
            submission = store.client.submit(again["operations"], request_id=name, **options)
            assert (submission.new, submission.sent) == (False, False), name


def test_a_request_with_a_name_that_aws_refuses_is_refused_when_sent_again(store: Site) -> None:
    """Its records stay readable. The same operations are refused now, before DynamoDB would refuse them."""
    with pytest.raises(InvalidOperations, match="operation 1: data: name '' has 0 bytes, expected 1 to 65535"):
        store.client.submit(store.corpus.requests["seed"]["operations"], request_id="seed")


# -- what a plain app's worker goes on with


def test_messages_are_executed(shop: Site, replay: str) -> None:
    """Recorded messages are delivered, and their tasks, callbacks and chords come to the results that are expected.

    The messages are of plain tasks, canvases and retries, and a dead letter that is sent again. The chords are untouched,
    half-done, or complete and not fired.
    """
    expected = shop.expected["replays"][replay]
    shop.environment.send(*(in_task_queue(shop, name) for name in expected["messages"]))
    for task_id, value in expected["results"].items():
        check_result(shop, task_id, value)


def test_a_fired_chord_is_not_fired_again(shop: Site) -> None:
    """A part of a chord that was fired is executed again, and the chord's callback is not."""
    part, body = (shop.expected["fired"][name] for name in ("part", "body"))
    letter = shop.corpus.messages[SHOP][shop.expected["fired"]["message"]]
    before = shop.environment.executed.count(part)
    shop.environment.send(letter)
    until(lambda: shop.environment.executed.count(part) > before, within=TIMEOUT, what="the part is executed")
    until(shop.environment.is_idle, within=TIMEOUT, what="nothing follows")
    assert body not in shop.environment.executed


def test_delayed_messages_are_moved(shop: Site) -> None:
    """What is due goes from the due-time table to its queue and is executed, and what is not due stays."""
    delayed = shop.expected["delayed"]
    for task_id, value in delayed["moved"].items():
        check_result(shop, task_id, value)
    until(lambda: len(waiting := due_bodies(shop)) == 1 and delayed["kept"] in waiting[0], what="one message is left")
    assert delayed["kept"] not in shop.environment.executed


def test_a_command_is_obeyed(shop: Site) -> None:
    """A worker answers a command of an earlier version's client, in the queue that the command names."""
    text = shop.corpus.broadcasts["command"]
    reply_id = json.loads(json.loads(text)["body"])["reply_to"]["routing_key"]
    queue = f"{shop.environment.settings.control_topic}-reply-{reply_id}"
    shop.environment.sqs.create_queue(QueueName=queue)
    until(lambda: shop.environment.has_subscribers(shop.environment.settings.control_topic), what="the worker listens")
    shop.environment.publish_command(text)
    (answer,) = shop.environment.receive(queue)
    assert json.loads(json.loads(answer.body)["body"]) == {"shop@compat": {"ok": "pong"}}


def test_an_event_is_understood(shop: Site) -> None:
    """A listener shows an event of an earlier version's worker."""
    text = shop.corpus.broadcasts["events"]
    (event,) = json.loads(json.loads(text)["body"])
    with shop.environment.event_listener() as log:
        shop.environment.publish_events(text)
        assert event["runtime"] == 0.25
        until(lambda: "runtime=0.25" in log.read_text(), within=TIMEOUT, what="the event is shown")


# -- checks


def described(request: Any) -> dict[str, Any]:
    """A request, as far as a corpus says what is expected of it."""
    counts = [sum(request.counts.applied.values()), sum(request.counts.refused.values()), request.counts.failed]
    return {
        "state": str(request.state),
        "source": request.source,
        "lanes": request.lanes,
        "operations": request.operations,
        "counts": counts,
    }


def check_completed(store: Site, name: str) -> None:
    """A request is completed, all its operations applied once, and verified."""
    expected = store.expected["requests"][name]
    request = store.client.wait(name, timeout=TIMEOUT)
    assert (str(request.state), request.counts.failed) == ("completed", 0)
    assert (sum(request.counts.applied.values()), request.operations) == (
        expected["operations"],
        expected["operations"],
    )
    assert sorted([one.index, one.outcome, one.reason] for one in store.client.outcomes(name)) == expected["outcomes"]
    for entity, key, version, data in expected["effects"]:
        record = store.client.get(entity, key)
        assert (record.version, exact(record.data)) == (version, exact(data)), key
    assert store.client.verify(name).faults == []


def check_result(shop: Site, task_id: str, value: Any) -> None:
    """A task has, in the end, its result."""
    result = shop.app.AsyncResult(task_id)
    until(lambda: shown(result, value) == value, within=TIMEOUT, what=f"{task_id} has its result")


def shown(result: Any, expected: Any) -> Any:
    """A result in the form of what is expected of it: a value, an error or a state."""
    meta = result.backend.get_task_meta(result.id, cache=False)
    if isinstance(expected, dict) and set(expected) == {"state"}:
        return {"state": meta["status"]}
    if meta["status"] == "FAILURE":
        error = meta["result"]
        found = {"error": type(error).__name__, "args": list(error.args)}
        return {name: found[name] for name in expected} if isinstance(expected, dict) else found
    return meta["result"] if meta["status"] == "SUCCESS" else {"state": meta["status"]}


def in_task_queue(shop: Site, name: str) -> Any:
    """A message, where it is a dead letter as an operator sends it again."""
    letter = shop.corpus.messages[SHOP][name]
    return letter.sent_again(shop.environment.settings.queue) if name == "dead letter" else letter


def due_bodies(shop: Site) -> list[str]:
    """The messages in the due-time table."""
    return [item["body"]["S"] for item in shop.environment.items("due") if "body" in item]


def call(url: str, key: str) -> tuple[int, Any]:
    """GET with a bearer key; returns the status and the decoded body."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})  # noqa: S310  our own child
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
