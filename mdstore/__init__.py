"""A master data store on DynamoDB with exactly-once effect, fed through S3, SQS and Celery.

    from mdstore import ingest, submit, get

The names that need a broker are made from the settings on first use, so importing the package connects to nothing.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from mdstore.errors import (
    ConfigurationError,
    InvalidOperations,
    InvalidRequest,
    MdstoreError,
    NotFound,
    PayloadTooLarge,
    RequestConflict,
    Unavailable,
)
from mdstore.model import Operation, Outcome, Reason, State

if TYPE_CHECKING:
    from mdstore.client import Client, Submission

    _default = Client()
    aget, export, get, ingest, submit, verify = (
        _default.aget,
        _default.export,
        _default.get,
        _default.ingest,
        _default.submit,
        _default.verify,
    )

__all__ = [
    "Client",
    "ConfigurationError",
    "InvalidOperations",
    "InvalidRequest",
    "MdstoreError",
    "NotFound",
    "Operation",
    "Outcome",
    "PayloadTooLarge",
    "Reason",
    "RequestConflict",
    "State",
    "Submission",
    "Unavailable",
    "aget",
    "export",
    "get",
    "ingest",
    "submit",
    "verify",
]

_OF_DEFAULT_CLIENT = frozenset({"aget", "export", "get", "ingest", "submit", "verify"})


@cache
def _default_client() -> Client:
    from mdstore.client import Client  # noqa: PLC0415  importing the package must not import Celery

    return Client()


def __getattr__(name: str) -> Any:
    if name in _OF_DEFAULT_CLIENT:
        return getattr(_default_client(), name)
    if name in ("Client", "Submission"):
        from mdstore import client  # noqa: PLC0415

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
