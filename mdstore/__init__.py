"""A master data store on DynamoDB. It is fed through S3, SQS and Celery, and applies every operation exactly once.

    from mdstore import ingest, submit, get

These functions belong to a default `Client`, which is built from the settings on first use. Importing the package therefore
connects to nothing.
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
    from mdstore.async_client import AsyncClient, AsyncSubmission
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
    "AsyncClient",
    "AsyncSubmission",
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

_DEFAULT_CLIENT_NAMES = frozenset({"aget", "export", "get", "ingest", "submit", "verify"})


@cache
def _default_client() -> Client:
    from mdstore.client import Client  # noqa: PLC0415  importing the package must not import Celery

    return Client()


def __getattr__(name: str) -> Any:
    if name in _DEFAULT_CLIENT_NAMES:
        return getattr(_default_client(), name)
    if name in ("Client", "Submission"):
        from mdstore import client  # noqa: PLC0415

        return getattr(client, name)
    if name in ("AsyncClient", "AsyncSubmission"):
        from mdstore import async_client  # noqa: PLC0415

        return getattr(async_client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names too; they are made on first use."""
    return sorted({*globals(), *__all__})
