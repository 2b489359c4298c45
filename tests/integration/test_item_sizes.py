"""Records at DynamoDB's limits, over the embedded AWS: what fits no item goes to S3, and what AWS refuses is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from mdstore.errors import InvalidOperations
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.model import Counts, Reference
from mdstore.store import Store
from tests.integration.test_s3_in_lanes import settings_at


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with EmbeddedAws(port=free_port()) as aws:
        yield Store(settings_at(aws))


def apply(store: Store, line: str) -> Counts:
    sent: list[Reference] = []
    store.ingestor.accept([line.encode()], publish=sent.append)
    return store.writer.apply_lane(sent[0], 0).counts


@pytest.mark.parametrize("count", [17_300, 17_700, 18_100])
def test_a_record_full_of_the_widest_numbers_is_stored(store: Store, count: int) -> None:
    """Such a number takes 22 bytes. A record that exceeds 400 KB with them is kept in S3, and not refused."""
    digits = "9" * 37
    line = f'{{"op":"insert","entity":"e","key":"n{count}","data":{{"n":[{",".join([f"-{digits}.5"] * count)}]}}}}'
    assert apply(store, line).applied == {"insert": 1}
    data = store.records.get("e", f"n{count}").data
    assert data is not None
    assert [str(number) for number in data["n"]] == [f"-{digits}.5"] * count


@pytest.mark.parametrize("text", ["0e500", "0E-500", "-0.0e-400"])
def test_a_zero_with_an_exponent_is_stored_as_zero(store: Store, text: str) -> None:
    """DynamoDB takes no exponent above 125, and zero needs none."""
    line = f'{{"op":"upsert","entity":"e","key":"zero","data":{{"n":{text}}}}}'
    assert apply(store, line).applied == {"upsert": 1}
    assert store.records.get("e", "zero").data == {"n": 0}


@pytest.mark.parametrize(
    ("data", "field"),
    [({"a": {"": 1}}, "data.a"), ({"a": [{"n" * 65_536: 1}]}, "data.a[0]"), ({"": {}}, "data")],
    ids=["empty", "long", "empty, outermost"],
)
@pytest.mark.parametrize("op", ["insert", "patch"])
def test_a_name_that_aws_refuses_is_refused_at_submit(
    store: Store, op: str, data: dict[str, object], field: str
) -> None:
    """Whatever the emulator takes, the caller hears of it, with the field, before anything is stored."""
    line = json.dumps({"op": op, "entity": "e", "key": "k", "data": data}).encode()
    sent: list[Reference] = []
    with pytest.raises(InvalidOperations) as caught:
        store.ingestor.accept([line], publish=sent.append)
    (problem,) = caught.value.problems
    assert (problem.index, problem.field) == (0, field)
    assert "expected 1 to 65535" in problem.reason
    assert sent == []
