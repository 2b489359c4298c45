"""What is faster in the embedded AWS gives the same results."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

from mdstore.local.fast_ministack import copy_data

_ITEM = {
    "pk": {"S": "k"},
    "data": {"M": {"n": {"N": "1"}, "tags": {"L": [{"S": "a"}, {"BOOL": True}, {"NULL": True}]}}},
}


@pytest.mark.parametrize("value", [_ITEM, [_ITEM, [1, 2.5, None, b"x"]], {}, "text", 7, None, (1, [2]), {1, 2}])
def test_a_copy_is_equal(value: Any) -> None:
    copied = copy_data(value)
    assert copied == value
    assert type(copied) is type(value)


def test_a_copy_shares_nothing_that_can_change() -> None:
    """Each dict and list is a new one, also inside values that the standard library copies."""
    tags: list[Any] = [{"S": "a"}]
    value = {"plain": {"L": tags}, "default": defaultdict(dict, {"k": {"L": tags}})}
    copied = copy_data(value)
    tags[0]["S"] = "changed"
    tags.append({"S": "b"})
    assert copied == {"plain": {"L": [{"S": "a"}]}, "default": {"k": {"L": [{"S": "a"}]}}}
    assert type(copied["default"]) is defaultdict


def test_expressions_mean_the_same() -> None:
    """A remembered parse gives the same answer for another item, and an error of syntax is reported each time."""
    code = """
from mdstore.local.fast_ministack import speed_up
speed_up()
from ministack.services import dynamodb
for _ in range(2):
    for number in ("1", "2"):
        item, values = {"n": {"N": number}}, {":n": {"N": "1"}}
        print(dynamodb._evaluate_condition("attribute_exists(n) AND n = :n", item, values, {}))
        print(dynamodb._apply_update_expression(item, "SET n = n + :n", values, {})[0]["n"]["N"], item["n"]["N"])
    try:
        dynamodb._evaluate_condition("n = = :n", {}, values, {})
    except ValueError as error:
        print("token" in str(error))
print(dynamodb._tokenize.cache_info().hits > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "2", "1", "False", "3", "2", "True"] * 2 + ["True"]


def test_copies_are_made_faster_only_in_the_emulator() -> None:
    """Importing the module changes nothing."""
    assert copy.deepcopy is not copy_data
