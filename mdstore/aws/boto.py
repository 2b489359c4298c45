"""The one place where errors of boto3 are translated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError

from mdstore.aws.json_protocol import is_retryable
from mdstore.errors import DeploymentBroken, MdstoreError, Unavailable
from mdstore.settings import mask_passwords


@contextmanager
def boto_errors(what: str) -> Iterator[None]:
    """Turn boto3's errors into `Unavailable` or `DeploymentBroken`; `what` names the failed action in the message."""
    try:
        yield
    except ClientError as error:
        raise _translation(what, error) from error
    except BotoCoreError as error:
        raise Unavailable(f"{what}: {mask_passwords(str(error))}", code=type(error).__name__) from error


def error_code(error: ClientError) -> str:
    """Return AWS's code of an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _translation(what: str, error: ClientError) -> MdstoreError:
    code = error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = Unavailable if is_retryable(code, status) else DeploymentBroken
    return kind(f"{what}: {error}", code=code)
