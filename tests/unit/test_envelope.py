"""Envelopes: messages that Celery sends pass the check, and the error of any other message names what is wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from queue import Empty
from typing import Any

import msgspec
import pytest
from celery import Celery, Signature, chain, chord, group
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.model import MAX_AGE
from mdstore.queue.broker.envelope import Headers, Malformed, check, in_one_line, task_of

Message = dict[str, Any]
DAY = timedelta(days=1)


# -- messages that Celery sends


@pytest.fixture(scope="module")
def celery() -> Iterator[Celery]:
    """Provide a plain Celery app whose messages stay in memory."""
    app = Celery("sender", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_default_queue = "envelopes"
    app.finalize()
    yield app
    app.close()


@pytest.fixture
def sent(celery: Celery) -> Callable[[], list[str]]:
    """Return a function that returns the messages sent since its last call, as kombu's SQS transport writes them."""

    def messages() -> list[str]:
        found: list[str] = []
        with celery.connection_for_read() as connection, suppress(Empty):
            while True:
                found.append(json.dumps(connection.default_channel._get("envelopes")))
        return found

    messages()
    return messages


def part(app: Celery, *arguments: Any) -> Signature:
    return app.signature("shop.apply", args=arguments)


SENT: dict[str, Callable[[Celery], Any]] = {
    "a task": lambda app: part(app, {"v": 1}, 3).apply_async(),
    "without arguments": lambda app: app.signature("t").apply_async(),
    "with names": lambda app: app.signature("t", kwargs={"a": "ü", "b": None}).apply_async(),
    "later": lambda app: part(app).apply_async(countdown=60),
    "much later": lambda app: part(app).apply_async(eta=datetime.now(UTC) + 13 * DAY),
    "that expires": lambda app: part(app).apply_async(expires=60),
    "that expired": lambda app: part(app).apply_async(expires=datetime(2001, 1, 1, tzinfo=UTC)),
    "with limits": lambda app: part(app).apply_async(time_limit=60, soft_time_limit=1.5),
    "with a hard limit": lambda app: part(app).apply_async(time_limit=60),
    "without a result": lambda app: part(app).apply_async(ignore_result=True),
    "under another name": lambda app: part(app).apply_async(shadow="other"),
    "tried before": lambda app: part(app).apply_async(retries=3),
    "with a priority": lambda app: part(app).apply_async(priority=3),
    "with headers": lambda app: part(app).apply_async(headers={"traceparent": "00-ab-cd-01"}),
    "stamped": lambda app: part(app).apply_async(stamped_headers=["batch"], batch="7"),
    "with callbacks": lambda app: part(app).apply_async(link=part(app), link_error=part(app)),
    "a chain": lambda app: chain(part(app), part(app), part(app)).apply_async(),
    "a group": lambda app: group([part(app, n) for n in range(3)], app=app).apply_async(),
    "a chord": lambda app: chord([part(app, n) for n in range(3)], app=app)(part(app)),
    "a chain of chords": lambda app: chain(chord([part(app), part(app)], part(app), app=app), part(app)).apply_async(),
}


@pytest.mark.parametrize("kind", SENT)
def test_messages_that_celery_sends_pass(celery: Celery, sent: Callable[[], list[str]], kind: str) -> None:
    """Every way to send a task makes messages that a worker may execute."""
    SENT[kind](celery)
    messages = sent()
    assert messages
    for text in messages:
        check(text)
        assert task_of(text) == json.loads(text)["headers"]["task"]


def test_every_header_that_celery_sends_is_known(celery: Celery, sent: Callable[[], list[str]]) -> None:
    """A header that a new version of Celery adds must be reviewed: something may depend on its value."""
    SENT["a chord"](celery)
    SENT["stamped"](celery)
    checked = set(Headers.__struct_fields__)
    only_displayed = {"lang", "argsrepr", "kwargsrepr", "origin", "batch"}
    assert {name for text in sent() for name in json.loads(text)["headers"]} <= checked | only_displayed


# -- messages that are refused


def message(**headers: Any) -> Message:
    """Return a valid message with additional headers."""
    return {
        "body": base64.b64encode(b'[[{"v":1}],{},{"chord":null}]').decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "mdstore.ingest", "id": "r1", **headers},
        "properties": {"body_encoding": "base64", "delivery_tag": "tag"},
    }


def reason_of(text: str | Message) -> str:
    """Return the reason for which a message is refused."""
    with pytest.raises(Malformed) as caught:
        check(text if isinstance(text, str) else json.dumps(text), received=True)
    reason = str(caught.value)
    assert reason.startswith("not a task's message: ")
    return reason


def test_the_unchanged_message_is_valid() -> None:
    """So each of the changed messages below is refused for its change."""
    check(json.dumps(message()))
    check(json.dumps({**message(), "properties": {}, "body": "[[],{},null]"}))


@pytest.mark.parametrize("field", ["body", "content-type", "content-encoding", "headers", "properties"])
@pytest.mark.parametrize("value", [None, 7, [], "\u2400"], ids=["null", "number", "list", "text"])
def test_each_part_of_the_envelope_is_checked(field: str, value: Any) -> None:
    """The error names a field whose type or value is wrong, and a missing field."""
    reason = reason_of({**message(), field: value})
    assert f"`$.{field}`" in reason or reason.startswith(f"not a task's message: {field}: ")
    missing = message()
    del missing[field]
    assert f"missing required field `{field}`" in reason_of(missing)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("content-type", "application/x-yaml"),
        ("content-type", "application/x-python-serialize"),
        ("content-type", "application/json; charset=utf-8"),
        ("content-encoding", "utf-16"),
        ("content-encoding", "binary"),
    ],
)
def test_only_json_is_accepted(field: str, value: str) -> None:
    """Other content types and encodings could carry code."""
    assert f"`$.{field}`" in reason_of({**message(), field: value})


def test_a_name_is_made_one_line() -> None:
    """A caller's name for a task may hold anything; the log shows it in one line."""
    assert in_one_line("a\r\nb\x1b\x85\u2028\u20ac\uffff") == "a\\r\\nb\\x1b\\x85\\u2028\u20ac\uffff"
    assert len(in_one_line("\n" * 400)) == 500


LONG = "x" * 501
NAMES = ("task", "id", "root_id", "parent_id", "group", "shadow")
INVALID_NAMES: tuple[Any, ...] = ("", LONG, 7, ["a"], {})


@pytest.mark.parametrize(
    ("header", "value"),
    [
        *((name, value) for name in NAMES for value in INVALID_NAMES),
        ("task", None),
        ("id", None),
        ("group_index", "a"),
        ("group_index", 1.5),
        ("retries", "a"),
        ("retries", [1]),
        ("eta", 7),
        ("expires", []),
        ("timelimit", 7),
        ("timelimit", "ab"),
        ("timelimit", [1]),
        ("timelimit", [1, 2, 3]),
        ("timelimit", ["a", None]),
        ("timelimit", [0.5, None]),
        ("timelimit", [None, 0]),
        ("timelimit", [-1, None]),
        ("group_index", -1),
        ("group_index", 1_000_000),
        ("ignore_result", "yes"),
        ("ignore_result", 1),
        ("replaced_task_nesting", "a"),
        ("stamped_headers", 7),
        ("stamped_headers", [7]),
        ("stamps", 7),
        ("stamps", []),
        ("compression", "gzip"),
        ("compression", ""),
    ],
)
def test_each_header_that_code_depends_on_is_checked(header: str, value: Any) -> None:
    """Each header has the type that Celery relies on, and is within bounds; otherwise the error names the header."""
    assert f"`$.headers.{header}" in reason_of(message(**{header: value}))


@pytest.mark.parametrize("header", ["task", "id"])
def test_a_message_without_a_task_name_or_an_id_is_refused(header: str) -> None:
    """The error names the missing header."""
    found = message()
    del found["headers"][header]
    assert f"missing required field `{header}` - at `$.headers`" in reason_of(found)


@pytest.mark.parametrize("header", set(Headers.__struct_fields__) - {"task", "id"})
def test_optional_headers_may_be_null(header: str) -> None:
    """A header that may be missing may also be null."""
    check(json.dumps(message(**{header: None})))


def test_values_at_the_bounds_are_accepted() -> None:
    """The longest id and the shortest time limit are valid."""
    check(json.dumps(message(id="x" * 500, timelimit=[1, 1.0])))


@pytest.mark.parametrize("header", ["eta", "expires"])
@pytest.mark.parametrize("value", ["tomorrow", "", "2026-13-01T00:00:00", "2026-11-23T00:00:00+99:00", "1"])
def test_times_must_be_in_iso_8601(header: str, value: str) -> None:
    """A time that Celery could not parse is refused, with its name, before Celery tries."""
    assert reason_of(message(**{header: value})).startswith(f"not a task's message: {header}: ")


def test_an_eta_beyond_the_retention_of_sqs_is_refused() -> None:
    """A worker would hold such a message for ever. The check works with and without a time zone, and up to the year 9999."""
    now, most = datetime.now(UTC), timedelta(seconds=MAX_AGE)
    for late in (now + most + DAY, now.replace(tzinfo=None) + most + DAY):
        assert reason_of(message(eta=late.isoformat())).startswith("not a task's message: eta: ")
    assert "eta" in reason_of(message(eta="9999-12-31T23:59:59-23:59"))
    for early in (now - DAY, now + most - DAY, now.replace(tzinfo=None) + most - DAY):
        check(json.dumps(message(eta=early.isoformat())), received=True)


def test_any_expiry_time_is_accepted() -> None:
    """Seconds since 1970 are accepted too; this check does not decide whether the message has expired."""
    for moment in ("2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00", 1_795_000_000.5):
        check(json.dumps(message(expires=moment)))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"7", b"{}", b"[]", b"[[],{}]", b"[[],{},{},{}]", b"[7,{},{}]", b"[[],[],{}]", b"[[],{},[]]",
     b"[{},{},{}]", b"[[],{},{}", b"\xff", b"- [1]\n- {}\n- {}\n", b"\x80\x04K\x07."],
)  # fmt: skip
def test_the_body_must_be_args_kwargs_and_options(content: bytes) -> None:
    """Celery would drop arguments that are not a list, and call the task without them."""
    reason = reason_of({**message(), "body": base64.b64encode(content).decode()})
    assert reason.startswith("not a task's message: body: ")


@pytest.mark.parametrize("body", ["%%%", "W1tdLHt9LHt9X", "W1tdLHt9LG51bGxd\n!", "ü"])
def test_a_base64_body_must_be_strictly_base64(body: str) -> None:
    """Python's lenient decoder would skip other characters."""
    assert reason_of({**message(), "body": body}).startswith("not a task's message: body: ")


@pytest.mark.parametrize("encoding", ["rot13", "", 7, ["base64"]])
def test_a_body_in_another_encoding_is_refused(encoding: Any) -> None:
    """Kombu would look up a codec of that name."""
    assert "`$.properties.body_encoding`" in reason_of({**message(), "properties": {"body_encoding": encoding}})


@pytest.mark.parametrize("text", ["", "7", "null", "[]", '"x"', "{", "{}", "[" * 100_000, '{"a":' * 100_000, "\ud800"])
def test_text_that_is_not_an_envelope_is_refused(text: str) -> None:
    """The text is not JSON, is not an object, or is nested deeper than the parser allows."""
    assert reason_of(text).startswith("not a task's message: envelope: ")
    assert task_of(text) == ""


def test_deep_nesting_is_refused_without_a_crash() -> None:
    """This holds for deeply nested arguments, keyword arguments, options and headers."""
    deep: Any = "[" * 100_000 + "]" * 100_000
    for content in (f"[{deep},{{}},{{}}]", f'[[],{{"a":{deep}}},{{}}]', f'[[],{{}},{{"chord":{deep}}}]'):
        assert "body" in reason_of({**message(), "body": base64.b64encode(content.encode()).decode()})
    assert "envelope" in reason_of(json.dumps(message(x="?")).replace('"?"', deep))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([*message(), *Headers.__struct_fields__]), JSON)
def test_any_value_in_any_field_is_accepted_or_refused(name: str, value: Any) -> None:
    """`check` either returns or raises `Malformed`; no other error is raised."""
    found = message()
    place = found["headers"] if name in Headers.__struct_fields__ else found
    place[name] = value
    text = msgspec.json.encode(found).decode()
    with suppress(Malformed):
        check(text)
    assert isinstance(task_of(text), str)


# -- the task's name


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (json.dumps(message()), "mdstore.ingest"),
        ('{"headers":{"task":"t"}}', "t"),
        ('{"headers":{"task":""}}', ""),
        ('{"headers":{"task":7}}', ""),
        ('{"headers":{}}', ""),
        ('{"headers":[]}', ""),
        ("{}", ""),
        ('{"headers":{"task":"t"}', ""),
    ],
)
def test_task_of_returns_the_name_in_the_headers(text: str, task: str) -> None:
    """It returns the name even if the message is refused for another reason, and an empty text if there is no name."""
    assert task_of(text) == task
