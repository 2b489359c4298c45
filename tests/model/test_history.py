"""Tests of `History` itself: it accepts a history that the design allows, and finds each kind of violation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mdstore.model import Operation, OpName, Reason
from tests.model.environment import RULES
from tests.model.history import Commit, Faulty, History
from tests.model.model import Key, Known, OperationInput

A, B = ("e", "a"), ("e", "b")


def op(
    name: OpName, key: Key, n: int | None = None, *, group: str | None = None, version: int | None = None
) -> OperationInput:
    data = None if n is None else {"n": n}
    return Operation(op=name, entity=key[0], key=key[1], data=data, group=group, expect_version=version)


def record(n: int, version: int) -> Known:
    return Known(data={"n": n}, version=version)


def commit(
    request: str, number: int, found: Mapping[Key, Known | None], refused: Mapping[int, Reason] | None = None
) -> Commit:
    return Commit(
        request_id=request, lane=0, number=number, keys=tuple(found), refused=refused or {}, records=dict(found)
    )


REQUESTS: dict[str, list[OperationInput]] = {
    "r0": [op("upsert", A, 1), op("upsert", A, 2), op("update", B, 3)],
    "r1": [op("patch", A, 5), op("insert", B, 6, group="g"), op("check", A, version=9, group="g")],
}
MISSING, MISMATCH, GROUP = Reason.MISSING, Reason.VERSION_MISMATCH, Reason.GROUP_REFUSED
FIRST = commit("r0", 0, {A: record(1, 1)}, {2: MISSING})
SECOND = commit("r0", 1, {A: record(2, 2)})
PATCH = commit("r1", 0, {A: record(5, 2)})
REFUSAL = commit("r1", 1, {}, {1: GROUP, 2: MISMATCH})
LAST = commit("r0", 1, {A: record(2, 3)})
LEGAL = [FIRST, PATCH, REFUSAL, LAST]


def test_a_legal_history_passes() -> None:
    """Two interleaved requests have their outcomes, and the records are those that the last commit left."""
    history = History(REQUESTS, LEGAL, RULES)
    assert history.states == {A: record(2, 3)}
    assert history.outcomes("r0") == {0: None, 1: None, 2: MISSING}
    assert history.outcomes("r1") == {0: None, 1: GROUP, 2: MISMATCH}


@pytest.mark.parametrize(
    ("commits", "fault"),
    [
        ([FIRST, FIRST], "took effect twice"),
        ([FIRST, SECOND, commit("r0", 2, {A: record(2, 3)})], "applied more often than there are operations"),
        ([commit("r0", 0, {A: record(2, 1)})], "is Known"),
        ([commit("r0", 0, {A: record(1, 2)})], "is Known"),
        ([commit("r1", 0, {A: record(5, 1)})], "which refuses it"),
        ([FIRST, PATCH, commit("r1", 1, {B: record(6, 1)})], "applied in part"),
        ([FIRST, PATCH, commit("r1", 1, {B: record(6, 1)}, {2: MISMATCH})], "applied in part|was refused in part"),
        ([FIRST, PATCH, commit("r1", 1, {}, {2: MISMATCH})], "was refused in part"),
        ([FIRST, PATCH, commit("r1", 1, {}, {1: GROUP, 2: GROUP})], "none of it has a reason of its own"),
        ([FIRST, PATCH, commit("r1", 1, {}, {1: Reason.EXISTS, 2: GROUP})], "was refused as exists"),
        ([FIRST, commit("r1", 1, {}, {1: GROUP, 2: MISMATCH})], "went before what is before it"),
        ([FIRST, commit("r0", 1, {}, {1: Reason.STALE})], "was refused as stale"),
        ([FIRST, commit("r0", 1, {}, {2: MISSING})], "refused by two receipts"),
    ],
)  # fmt: skip
def test_a_broken_history_is_found(commits: list[Commit], fault: str) -> None:
    """Applying twice, out of order, in part, or on a wrong record, and refusing without a valid reason, are each found."""
    with pytest.raises((Faulty, AssertionError), match=fault):
        History(REQUESTS, commits, RULES)


def test_an_operation_without_outcome_is_found() -> None:
    """A history in which an operation has no outcome is refused."""
    with pytest.raises(Faulty, match="have no outcome"):
        History(REQUESTS, LEGAL[:-1], RULES).outcomes("r0")


def test_a_refusal_may_be_older_than_its_receipt() -> None:
    """A refusal's reason may end before its receipt is written, but must hold after the earlier operations on its keys."""
    requests: dict[str, list[OperationInput]] = {"r0": [op("update", A, 1)], "r1": [op("upsert", A, 2)]}
    refused, made = commit("r0", 0, {}, {0: MISSING}), commit("r1", 0, {A: record(2, 1)})
    assert History(requests, [made, refused], RULES).outcomes("r0") == {0: MISSING}
    late: dict[str, list[OperationInput]] = {"r0": [op("upsert", A, 1), op("update", A, 1)]}
    with pytest.raises(Faulty, match="was refused as missing"):
        History(late, [commit("r0", 0, {A: record(1, 1)}), commit("r0", 1, {}, {1: MISSING})], RULES)
