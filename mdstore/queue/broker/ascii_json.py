"""JSON in ASCII, which carries any Python string through SQS and SNS.

SQS accepts only the characters of XML 1.0, which exclude U+FFFF for example, and UTF-8 cannot encode lone surrogates. JSON can
hold both as escapes. msgspec is fast but neither writes nor reads lone surrogates, so Python's `json` does that. Every message,
event and claim is encoded by `dumps`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
from kombu.utils.json import loads as kombu_loads

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_MAYBE_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def dumps(value: Any, *, enc_hook: Callable[[Any], Any] | None = None) -> str:
    """Encode as compact JSON in ASCII. `enc_hook` returns what to encode instead of an object that is not JSON."""
    try:
        text = (msgspec.json.encode(value, enc_hook=enc_hook) if enc_hook else _encode(value)).decode()
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(value, enc_hook=enc_hook, str_keys=True)
        return json.dumps(plain, separators=(",", ":"))
    return escaped(text)


def escaped(text: str) -> str:
    """Return a JSON text with every non-ASCII character escaped. Such characters occur only inside its strings."""
    return text if text.isascii() else _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


def check_objects(text: str) -> None:
    """Raise `ValueError` if kombu cannot decode an object in a JSON text, such as `{"__type__": "nobody", "__value__": 1}`."""
    if "__type__" not in text:
        return
    try:
        kombu_loads(text)
    except Exception as error:  # the type's decoder may raise anything
        raise ValueError(f"kombu cannot decode it: {error!r}") from error


class Decoder(Generic[T]):
    """Decodes JSON of one type as msgspec does, even if a string contains a lone surrogate.

    `decode` raises `ValueError` (msgspec's errors are `ValueError`s) or `RecursionError`. A text with lone
    surrogates is converted to the type `strict`, if given, which can refuse them where other code needs valid Unicode.
    """

    def __init__(self, type_: type[T] | Any = Any, *, strict: Any = None) -> None:
        self._decode = msgspec.json.Decoder(type_).decode
        self._type = strict or type_

    def decode(self, text: str) -> T:
        """Decode a text."""
        try:
            found: T = self._decode(text)
        except ValueError as error:
            if isinstance(error, msgspec.ValidationError) or not _MAYBE_HALF_PAIR.search(text):
                raise
            found = msgspec.convert(json.loads(text), self._type)
        return found
