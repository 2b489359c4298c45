"""The stand-in for AWS that benchmarks use evaluates expressions as DynamoDB does, and refuses those that it does not know."""

from __future__ import annotations

import pytest

from benchmarks.memory_aws.expressions import InvalidExpressionError, Item, condition, update

NAMES = (("#state", "state"), ("#reference", "reference"), ("#id", "request_id"))
VALUES: Item = {":done": {"S": "completed"}, ":batch": {"S": "b1"}}
RUNNING: Item = {"pk": {"S": "r"}, "state": {"S": "running"}, "reference": {"M": {"request_id": {"S": "b1"}}}}


@pytest.mark.parametrize(
    ("item", "holds"),
    [
        (RUNNING, True),
        ({}, True),
        ({**RUNNING, "state": {"S": "completed"}}, False),
        ({**RUNNING, "reference": {"M": {"request_id": {"S": "b2"}}}}, False),
        ({**RUNNING, "reference": {"M": {}}}, False),
        ({**RUNNING, "reference": {"S": "b1"}}, False),
        ({"pk": {"S": "r"}, "state": {"S": "running"}}, False),
    ],
)
def test_conditions_compare_what_a_path_leads_to(item: Item, holds: bool) -> None:
    """A path that leads nowhere is equal to nothing."""
    text = "attribute_not_exists(pk) OR (#state <> :done AND #reference.#id = :batch)"
    assert condition(text, NAMES)(item, VALUES) is holds


@pytest.mark.parametrize("text", ["attribute_exists(#reference.#id)", "#unknown = :batch", "#state[0] = :batch"])
def test_unknown_expressions_are_errors(text: str) -> None:
    """A condition outside the supported grammar is not evaluated as something else."""
    with pytest.raises(InvalidExpressionError):
        condition(text, NAMES)


def test_an_update_leaves_the_old_item_as_it_is() -> None:
    """Each clause changes the new item only."""
    old: Item = {"pk": {"S": "r"}, "count": {"N": "1"}, "gone": {"S": "x"}, "members": {"NS": ["1"]}}
    before = dict(old)
    change = update(
        "SET #state = if_not_exists(#state, :done), count = count + :one REMOVE gone ADD members :two", NAMES
    )
    values: Item = {**VALUES, ":one": {"N": "1"}, ":two": {"NS": ["2"]}}
    assert change(old, values) == {
        "pk": {"S": "r"}, "state": {"S": "completed"}, "count": {"N": "2"}, "members": {"NS": ["1", "2"]},
    }  # fmt: skip
    assert old == before
