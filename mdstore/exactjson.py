"""Lossless JSON: integers keep all their digits, other numbers become `Decimal`, and text is kept as given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import msgspec


def fraction(text: str) -> Decimal:
    """Read a JSON number that has a fraction or an exponent. Raises `ValueError` if no `Decimal` can hold it."""
    try:
        return Decimal(text)
    except ArithmeticError as error:
        raise ValueError(f"number out of range: {text[:40]}") from error


_decoder = msgspec.json.Decoder(float_hook=fraction)
_encoder = msgspec.json.Encoder(decimal_format="number")
_canonical_encoder = msgspec.json.Encoder(decimal_format="number", order="sorted")

_MALFORMED = re.compile(r"JSON is malformed: (?P<why>.*) \(byte (?P<byte>\d+)\)")
_INTEGRAL = 126  # the largest exponent that is written out: more would be megabytes of zeros

#: The errors that decoding hostile or broken text may raise. `UnicodeDecodeError` and msgspec's errors are `ValueError`s.
DecodeFailure = (ValueError, RecursionError)


#: The most digits of a number in text that `check_cost` has checked. Converting them takes more than linear time.
MOST_DIGITS = 1_000
#: Bytes of text that needs no check: whatever it holds is decoded within milliseconds.
SHORT = 2**14
_PIECE = 2**18  # bytes
_LONG_NUMBER = b"0" * (MOST_DIGITS + 1)
_DIGITS_AS_ZERO = bytes(ord("0") if byte in b"0123456789" else ord(" ") for byte in range(256))


def check_cost(text: bytes, *, most_values: int) -> None:
    """Raise `ValueError` if decoding would take too long, or many times as much memory as `text` has bytes.

    That is so if a number has more than 1,000 digits, or if there are more than `most_values` values. The check takes linear
    time, and belongs before decoding.
    """
    if len(text) <= SHORT or not _excess([text], most_values):
        return
    if excess := _excess(_outside_strings(text), most_values):  # digits and commas in strings cost nothing
        raise ValueError(excess)


def _excess(pieces: Iterable[bytes], most_values: int) -> str:
    values = 0
    for piece in pieces:
        # One of these precedes each value, or its name.
        values += piece.count(b",") + piece.count(b"[") + piece.count(b"{")
        if values > most_values:
            return f"more than {most_values} values"
        if _LONG_NUMBER in piece.translate(_DIGITS_AS_ZERO):
            return f"a number of more than {MOST_DIGITS} digits"
    return ""


def _outside_strings(text: bytes) -> Iterator[bytes]:
    """Yield the text outside of strings, piece by piece: splitting all at once would take many times the text's memory."""
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a string
    is_inside = False
    for start in range(0, len(text), _PIECE):
        parts = text[start : start + _PIECE].split(b'"')
        yield b" ".join(parts[is_inside::2])
        is_inside ^= len(parts) % 2 == 0


def loads(text: bytes | str) -> Any:
    """Decode JSON. Raises one of `DecodeFailure`."""
    return _decoder.decode(text)


def dumps(value: Any) -> bytes:
    """Encode as compact JSON in UTF-8. A `Decimal` becomes a number."""
    return _encoder.encode(value)


def canonical(value: Any) -> bytes:
    """Encode equal JSON values as equal bytes: keys are sorted, `1.50` becomes `1.5`, and `2.0` and `2E0` become `2`."""
    return _canonical_encoder.encode(_normal(value))


def explain(text: bytes | str, error: Exception, *, with_line: bool = True) -> str:
    """Return in plain words why `text` could not be decoded, after the line and the column, which are counted from 1.

    The column counts characters. If the text is itself a line, leave the line out (`with_line=False`).
    """
    given = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    position, why = _locate(given, error)
    if position is None:
        return why
    before = given[:position].decode(errors="replace")
    column = f"column {len(before) - before.rfind(chr(10))}: {why}"
    return f"line {before.count(chr(10)) + 1}, {column}" if with_line else column


def _locate(text: bytes, error: Exception) -> tuple[int | None, str]:
    """Return the position of the byte at which decoding failed, if it is known, and why it failed."""
    if isinstance(error, UnicodeDecodeError):
        try:
            text.decode()
        except UnicodeDecodeError as first:  # the decoder's own error counts from the start of a string
            return first.start, "not UTF-8"
    if isinstance(error, RecursionError):
        return None, "nested too deeply"
    why = str(error)
    if why == "Input data was truncated":
        return len(text.rstrip()), "the text ends too early"
    found = _MALFORMED.fullmatch(why)
    if found is None:
        return None, why
    # After a complete value, the decoder's position is behind the character that it refuses.
    is_after = found["why"] == "trailing characters"
    return int(found["byte"]) - is_after, found["why"]


def number(text: str) -> int | Decimal:
    """Read a DynamoDB number as an int if it is integral, else as a `Decimal`."""
    value = Decimal(text)
    return int(value) if value == value.to_integral_value() else value


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    if isinstance(value, float):
        value = Decimal(repr(value))
    if isinstance(value, Decimal):
        return _stripped(value)
    return value


def _stripped(value: Decimal) -> int | Decimal:
    """Return a number without trailing zeros: as an int if it is integral and of a magnitude that DynamoDB can hold."""
    # Decimal.normalize() would round to the 28 digits of the default context.
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise ValueError(f"{value} is not a JSON number")  # noqa: TRY004  the type is right
    end = len(digits)
    while end and digits[end - 1] == 0:
        end -= 1
    exponent += len(digits) - end
    if not end:
        return 0
    stripped = Decimal((sign, digits[:end], exponent))
    return int(stripped) if 0 <= exponent <= _INTEGRAL else stripped
