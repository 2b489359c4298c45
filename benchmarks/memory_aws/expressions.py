"""DynamoDB's condition and update expressions, compiled once each.

Grammar: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Expressions.OperatorsAndFunctions.html and
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Expressions.UpdateExpressions.html. An attribute is named as
`name` or `#placeholder`. What is compared may be a path into maps; other paths are an error.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

Value = dict[str, Any]
Item = dict[str, Value]
Operand = Callable[[Item, Item], Value | None]  # of the item, and the expression's values
Condition = Callable[[Item, Item], bool]
Names = tuple[tuple[str, str], ...]

_TOKEN = re.compile(r"\s*(<>|<=|>=|[=<>(),+-]|[#:]?[A-Za-z_]\w*(?:\.#?[A-Za-z_]\w*)*|$)")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_SETS = ("SS", "NS", "BS")


class InvalidExpressionError(ValueError):
    """An expression is not in the supported grammar."""


@lru_cache(maxsize=4_096)
def condition(text: str, names: Names) -> Condition:
    """Compile a condition, a filter or a key condition."""
    parser = _Parser(text, dict(names))
    found = parser.disjunction()
    parser.expect("")
    return found


@lru_cache(maxsize=4_096)
def update(text: str, names: Names) -> Callable[[Item, Item], Item]:
    """Compile an update; it returns the new item, and leaves the old one as it is."""
    changes = _Parser(text, dict(names)).changes()

    def updated(item: Item, values: Item) -> Item:
        new = dict(item)
        for name, change in changes:
            value = change(item, values)
            if value is None:
                new.pop(name, None)
            else:
                new[name] = value
        return new

    return updated


class _Parser:
    """A recursive-descent parser, one method per rule."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        self._text, self._names = text, names
        self._at = 0
        self._word = ""
        self._advance()

    def disjunction(self) -> Condition:
        """Parse `a OR b ...`."""
        found = self._conjunction()
        while self._accept("OR"):
            found = _either(found, self._conjunction())
        return found

    def changes(self) -> list[tuple[str, Operand]]:
        """Parse the clauses of an update: the attributes, and the value that each gets; None removes it."""
        found: list[tuple[str, Operand]] = []
        while self._word:
            verb = self._take().upper()
            while True:
                found.append(self._change(verb))
                if not self._accept(","):
                    break
        return found

    def expect(self, word: str) -> None:
        """Take `word`."""
        if self._word.upper() != word:
            raise InvalidExpressionError(f"{word or 'the end'} expected before {self._word!r}: {self._text}")
        self._advance()

    def _change(self, verb: str) -> tuple[str, Operand]:
        name = self._name(self._take())
        match verb:
            case "SET":
                self.expect("=")
                return name, self._sum()
            case "REMOVE":
                return name, lambda _item, _values: None
            case "ADD":
                return name, _added(name, self._operand())
            case "DELETE":
                return name, _without(name, self._operand())
        raise InvalidExpressionError(f"{verb}: {self._text}")

    def _sum(self) -> Operand:
        left = self._operand()
        if self._word in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            right = self._operand()
            return lambda item, values: {"N": str(_number(left(item, values)) + sign * _number(right(item, values)))}
        return left

    def _conjunction(self) -> Condition:
        found = self._negation()
        while self._accept("AND"):
            found = _both(found, self._negation())
        return found

    def _negation(self) -> Condition:
        if self._accept("NOT"):
            inner = self._negation()
            return lambda item, values: not inner(item, values)
        if self._accept("("):
            found = self.disjunction()
            self.expect(")")
            return found
        return self._predicate()

    def _predicate(self) -> Condition:
        word = self._word
        if word in ("attribute_exists", "attribute_not_exists"):
            name = self._name(self._arguments(1)[0])
            return (lambda item, _: name in item) if word == "attribute_exists" else lambda item, _: name not in item
        if word == "begins_with":
            name, prefix = self._arguments(2)
            left, right = self._operand_of(name), self._operand_of(prefix)
            return lambda item, values: _text(left(item, values)).startswith(_text(right(item, values)))
        if word == "contains":
            name, part = self._arguments(2)
            left, right = self._operand_of(name), self._operand_of(part)
            return lambda item, values: _contains(left(item, values), right(item, values))
        left = self._operand()
        if self._accept("BETWEEN"):
            low = self._operand()
            self.expect("AND")
            high = self._operand()
            return _both(_compared(">=", left, low), _compared("<=", left, high))
        if self._accept("IN"):
            self.expect("(")
            choices = [self._operand()]
            while self._accept(","):
                choices.append(self._operand())
            self.expect(")")
            return lambda item, values: any(equal(left(item, values), one(item, values)) for one in choices)
        return _compared(self._take(), left, self._operand())

    def _operand(self) -> Operand:
        if self._word == "if_not_exists":
            self._advance()
            self.expect("(")
            name = self._name(self._take())
            self.expect(",")
            default = self._operand()
            self.expect(")")
            return lambda item, values: item[name] if name in item else default(item, values)
        if self._word == "size":
            (name,) = self._arguments(1)
            of = self._operand_of(name)
            return lambda item, values: {"N": str(len(next(iter((of(item, values) or {"S": ""}).values()))))}
        return self._operand_of(self._take())

    def _operand_of(self, word: str) -> Operand:
        if word.startswith(":"):
            return lambda _, values: values[word]
        name, *path = map(self._name, word.split("."))
        return (lambda item, _: _inner(item.get(name), path)) if path else lambda item, _: item.get(name)

    def _arguments(self, count: int) -> list[str]:
        self._advance()
        self.expect("(")
        found = [self._take()]
        for _ in range(count - 1):
            self.expect(",")
            found.append(self._take())
        self.expect(")")
        return found

    def _name(self, word: str) -> str:
        if word in self._names:
            return self._names[word]
        if not word.isidentifier():
            raise InvalidExpressionError(f"an attribute expected, not {word!r}: {self._text}")
        return word

    def _accept(self, word: str) -> bool:
        if self._word.upper() != word:
            return False
        self._advance()
        return True

    def _take(self) -> str:
        word = self._word
        self._advance()
        return word

    def _advance(self) -> None:
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            raise InvalidExpressionError(f"{self._text[self._at :]!r} is not supported: {self._text}")
        self._at, self._word = found.end(), found[1]


def _inner(value: Value | None, path: Sequence[str]) -> Value | None:
    """Return what a path of attributes leads to inside a map."""
    for name in path:
        value = (value or {}).get("M", {}).get(name)
    return value


def equal(left: Value | None, right: Value | None) -> bool:
    """Return whether two values are equal as DynamoDB compares them: numbers by value, sets without order."""
    if left is None or right is None:
        return False
    if left == right:
        return True
    ((kind, one),), ((other_kind, other),) = left.items(), right.items()
    if kind != other_kind:
        return False
    if kind == "N":
        return Decimal(one) == Decimal(other)
    return kind in _SETS and sorted(one) == sorted(other)


def _compared(sign: str, left: Operand, right: Operand) -> Condition:
    if sign == "=":
        return lambda item, values: equal(left(item, values), right(item, values))
    if sign == "<>":
        return lambda item, values: not equal(left(item, values), right(item, values))
    compare = _COMPARE.get(sign)
    if compare is None:
        raise InvalidExpressionError(f"{sign!r} is not a comparison")
    return lambda item, values: _ordered(compare, left(item, values), right(item, values))


def _ordered(compare: Callable[[Any, Any], bool], left: Value | None, right: Value | None) -> bool:
    if left is None or right is None or left.keys() != right.keys():
        return False
    (kind,) = left
    return compare(Decimal(left[kind]), Decimal(right[kind])) if kind == "N" else compare(left[kind], right[kind])


def _both(left: Condition, right: Condition) -> Condition:
    return lambda item, values: left(item, values) and right(item, values)


def _either(left: Condition, right: Condition) -> Condition:
    return lambda item, values: left(item, values) or right(item, values)


def _contains(whole: Value | None, part: Value | None) -> bool:
    if whole is None or part is None:
        return False
    ((kind, members),), (inner,) = whole.items(), part.values()
    if kind == "L":
        return any(equal(member, part) for member in members)
    return inner in members


def _added(name: str, amount: Operand) -> Operand:
    def add(item: Item, values: Item) -> Value | None:
        old, more = item.get(name), amount(item, values)
        assert more is not None  # noqa: S101  DynamoDB's grammar: a value, not an attribute
        if old is None:
            return more
        if "N" in more:
            return {"N": str(_number(old) + _number(more))}
        (kind,) = more
        return {kind: sorted({*old[kind], *more[kind]})}

    return add


def _without(name: str, members: Operand) -> Operand:
    def remove(item: Item, values: Item) -> Value | None:
        old, less = item.get(name), members(item, values)
        if old is None or less is None:
            return old
        (kind,) = old
        left = sorted({*old[kind]} - {*less[kind]})
        return {kind: left} if left else None

    return remove


def _number(value: Value | None) -> int | Decimal:
    if value is None or "N" not in value:
        raise InvalidExpressionError(f"a number expected, not {value}")
    text: str = value["N"]
    return int(text) if text.lstrip("-").isdigit() else Decimal(text)


def _text(value: Value | None) -> str:
    return value.get("S", "") if value else ""
