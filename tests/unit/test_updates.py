"""The builder of conditional writes: each clause appears once, and each attribute is named by its placeholder."""

from __future__ import annotations

from mdstore.aws.dynamodb.updates import expressions, given, placeholders, unless_set


def test_each_clause_has_its_placeholders() -> None:
    """Each placeholder in the update and the condition has its name, and no other name is declared."""
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


def test_empty_clauses_are_left_out() -> None:
    """DynamoDB refuses empty expressions and empty maps of names."""
    assert expressions() == {}
    assert expressions(condition="attribute_exists(pk)") == {"ConditionExpression": "attribute_exists(pk)"}
    assert expressions(remove=["x"]) == {"UpdateExpression": "REMOVE #x", "ExpressionAttributeNames": {"#x": "x"}}


def test_an_attribute_may_have_another_name_than_its_placeholder() -> None:
    """An attribute such as `until#3` cannot be a placeholder in an expression."""
    made = expressions(set=given(["until"]), condition="#until = :is", names={"until": "until#3"})
    assert made["ExpressionAttributeNames"] == {"#until": "until#3"}


def test_values_are_keyed_by_their_placeholders() -> None:
    """The placeholder of a value is the name of its attribute."""
    assert placeholders({"a": 1}) == {":a": 1}
