"""How emulators differ from AWS. Each row marks tests as strict expected failures; docs/conformance.md has the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mdstore.errors import RequestRejected, TransactionCancelled, Unavailable

_AWS = "https://docs.aws.amazon.com/amazondynamodb/latest"
_TRANSACTION = f"{_AWS}/APIReference/API_TransactWriteItems.html"
_LIMITS = f"{_AWS}/developerguide/Constraints.html"
_EXPRESSION_NAMES = f"{_AWS}/developerguide/Expressions.ExpressionAttributeNames.html"
_EXPRESSION_VALUES = f"{_AWS}/developerguide/Expressions.ExpressionAttributeValues.html"
_CONDITIONS = f"{_AWS}/developerguide/Expressions.OperatorsAndFunctions.html"
_SIZES = f"{_AWS}/developerguide/CapacityUnitCalculations.html"
_BATCH = f"{_AWS}/APIReference/API_BatchGetItem.html"
_ERRORS = f"{_AWS}/developerguide/Programming.Errors.html"

#: An assertion does not hold, or an expected error is not raised.
_WRONG: tuple[type[BaseException], ...] = (AssertionError, pytest.fail.Exception)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`emulator` fails `test` (in `cases`, or in all cases) with one of `raises`; AWS's page `right` says what is right."""

    emulator: str
    test: str  # module.py::function
    instead: str
    right: str
    cases: tuple[str, ...] = ()
    raises: tuple[type[BaseException], ...] = _WRONG

    @property
    def module(self) -> str:
        """The file's name."""
        return self.test.partition("::")[0]

    @property
    def name(self) -> str:
        """The test and its cases, in pytest's form."""
        return self.test + (f"[{', '.join(self.cases)}]" if self.cases else "")

    def covers(self, emulator: str, test: str, case: str) -> bool:
        """Return whether a test, run with the parameters `case`, is expected to fail."""
        return (self.emulator, self.test) == (emulator, test) and (not self.cases or case in self.cases)


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        emulator="ministack",
        test="test_limits.py::test_a_transaction_of_3_5_mb_is_accepted",
        cases=("two-bytes",),
        instead="counts JSON in which non-ASCII letters are escaped, so it refuses 1.4 MB of é or more",
        right=_SIZES,
        raises=(RequestRejected,),
    ),
    Difference(
        emulator="ministack",
        test="test_writer.py::test_a_group_of_3_mb_is_one_transaction",
        cases=("two-bytes",),
        instead="refuses it for the same reason, so its lane fails",
        right=_SIZES,
        raises=(RequestRejected,),
    ),
    Difference(
        emulator="ministack",
        test="test_reads.py::test_a_batch_over_16_mb_says_what_it_left_out",
        instead="returns all items, however large the answer",
        right=_BATCH,
    ),
    Difference(
        emulator="ministack",
        test="test_errors.py::test_an_unknown_key_is_a_broken_deployment",
        instead="accepts any credentials",
        right=_ERRORS,
    ),
    Difference(
        emulator="moto",
        test="test_receipts.py::test_the_same_bytes_apply_once",
        instead="ignores the token and applies the transaction again",
        right=_TRANSACTION,
    ),
    Difference(
        emulator="moto",
        test="test_receipts.py::test_a_token_answers_for_its_own_write_only",
        instead="ignores the token and overwrites later writes",
        right=_TRANSACTION,
    ),
    Difference(
        emulator="moto",
        test="test_receipts.py::test_the_same_bytes_with_a_receipt_succeed_again",
        instead="ignores the token, so the receipt cancels a repeat that should succeed",
        right=_TRANSACTION,
        raises=(TransactionCancelled,),
    ),
    Difference(
        emulator="moto",
        test="test_receipts.py::test_a_token_is_bound_to_its_body",
        instead="ignores the token and applies the other body",
        right=_TRANSACTION,
    ),
    Difference(
        emulator="moto",
        test="test_receipts.py::test_a_token_of_36_characters_is_accepted",
        instead="accepts tokens of any length",
        right=_TRANSACTION,
    ),
    Difference(
        emulator="moto",
        test="test_values.py::test_a_39th_digit_is_refused",
        instead="stores numbers of any length",
        right=_LIMITS,
    ),
    Difference(
        emulator="moto",
        test="test_values.py::test_a_magnitude_out_of_range_is_refused",
        instead="stores numbers of any magnitude",
        right=_LIMITS,
    ),
    Difference(
        emulator="moto",
        test="test_values.py::test_text_that_is_not_a_number_is_refused",
        instead="stores any text as a number if it is in a list",
        right=_LIMITS,
    ),
    Difference(
        emulator="moto",
        test="test_limits.py::test_a_put_of_33_levels_is_malformed",
        instead="accepts any nesting",
        right=_LIMITS,
    ),
    Difference(
        emulator="moto",
        test="test_limits.py::test_an_update_to_33_levels_is_cancelled",
        instead="accepts any nesting",
        right=_LIMITS,
    ),
    Difference(
        emulator="moto",
        test="test_limits.py::test_an_item_of_400_kb_is_accepted",
        instead="refuses items of 405,000 bytes or more",
        right=_LIMITS,
        raises=(RequestRejected,),
    ),
    Difference(
        emulator="moto",
        test="test_limits.py::test_an_update_that_makes_an_item_too_large_is_cancelled",
        instead="refuses the whole call and gives no reason for the action",
        right=_TRANSACTION,
        raises=(RequestRejected,),
    ),
    Difference(
        emulator="moto",
        test="test_limits.py::test_attributes_that_an_update_leaves_unchanged_count_too",
        instead="refuses the whole call and gives no reason for the action",
        right=_TRANSACTION,
        raises=(RequestRejected,),
    ),
    Difference(
        emulator="moto",
        test="test_limits.py::test_a_transaction_over_4_mb_is_refused",
        instead="accepts transactions of any size",
        right=_TRANSACTION,
    ),
    Difference(
        emulator="moto",
        test="test_expressions.py::test_a_value_that_is_not_used_is_refused",
        instead="ignores it in transactions",
        right=_EXPRESSION_VALUES,
    ),
    Difference(
        emulator="moto",
        test="test_expressions.py::test_a_value_that_is_not_declared_is_refused",
        instead="answers 500",
        right=_EXPRESSION_VALUES,
        raises=(Unavailable,),
    ),
    Difference(
        emulator="moto",
        test="test_expressions.py::test_a_name_that_is_not_declared_is_refused",
        instead="answers 500",
        right=_EXPRESSION_NAMES,
        raises=(Unavailable,),
    ),
    Difference(
        emulator="moto",
        test="test_expressions.py::test_a_malformed_expression_is_refused",
        instead="answers 500",
        right=_CONDITIONS,
        raises=(Unavailable,),
    ),
    Difference(
        emulator="moto",
        test="test_writer.py::test_one_bad_record_never_blocks_the_others",
        cases=("insert-39-digits", "upsert-39-digits", "upsert-no-number"),
        instead="stores text that is not a number, so nothing is refused",
        right=_LIMITS,
    ),
    Difference(
        emulator="moto",
        test="test_writer.py::test_one_bad_record_never_blocks_the_others",
        cases=("insert-no-number",),
        instead="cancels with a code that AWS does not have, `ValidationException`",
        right=_TRANSACTION,
        raises=(RequestRejected,),
    ),
    Difference(
        emulator="moto",
        test="test_errors.py::test_an_unknown_key_is_a_broken_deployment",
        instead="accepts any credentials",
        right=_ERRORS,
    ),
)
