"""The builder of conditional writes: every clause once, every attribute named by its placeholder."""

from __future__ import annotations

from mdstore.aws.dynamodb.updates import expressions, given, placeholders, unless_set


def test_all_clauses_and_their_names() -> None:
    """Each placeholder of update and condition has its name, and no other has."""
    assert expressions(
        set={**given(["a"]), **unless_set(["b"]), "n": "#n + :one"},
        add={"s": ":s"},
        remove=["c"],
        condition="#d = :d",
    ) == {
        "UpdateExpression": "SET #a = :a, #b = if_not_exists(#b, :b), #n = #n + :one ADD #s :s REMOVE #c",
        "ConditionExpression": "#d = :d",
        "ExpressionAttributeNames": {f"#{name}": name for name in "abnscd"},
    }


def test_what_is_not_given_is_left_out() -> None:
    """DynamoDB refuses empty expressions and empty maps of names."""
    assert expressions() == {}
    assert expressions(condition="attribute_exists(pk)") == {"ConditionExpression": "attribute_exists(pk)"}
    assert expressions(remove=["x"]) == {"UpdateExpression": "REMOVE #x", "ExpressionAttributeNames": {"#x": "x"}}


def test_an_attribute_may_have_another_name_than_its_placeholder() -> None:
    """An attribute such as `until#3` is no word of the grammar."""
    made = expressions(set=given(["until"]), condition="#until = :is", names={"until": "until#3"})
    assert made["ExpressionAttributeNames"] == {"#until": "until#3"}


def test_values_go_under_their_placeholders() -> None:
    """A value is known by the name of its attribute."""
    assert placeholders({"a": 1}) == {":a": 1}
