"""Authentication by `Authorization: Bearer KEY`. Keys are never logged and never part of a response."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from mdstore.client import Client
from mdstore.store.api_keys import ApiKey, Scope

_bearer = HTTPBearer(auto_error=False, description="An API key. `mdstore up` creates and prints one.")


def client_of(request: Request) -> Client:
    """Return the application's client."""
    client: Client = request.app.state.client
    return client


TheClient = Annotated[Client, Depends(client_of)]


def _caller(client: TheClient, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> ApiKey:
    found = client.store.api_keys.find(credentials.credentials) if credentials else None
    if found is None:
        detail = "Send a valid API key: Authorization: Bearer KEY."
        raise HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})
    return found


def _require(scope: Scope, key: ApiKey) -> ApiKey:
    if scope not in key.scopes:
        challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
        raise HTTPException(
            403, f"This call needs a key with the scope {scope}.", headers={"WWW-Authenticate": challenge}
        )
    return key


async def _writer(key: Annotated[ApiKey, Depends(_caller)]) -> ApiKey:
    return _require(Scope.WRITE, key)


async def _reader(key: Annotated[ApiKey, Depends(_caller)]) -> ApiKey:
    return _require(Scope.READ, key)


#: The key of the caller, who may submit requests.
Writer = Annotated[ApiKey, Depends(_writer)]
#: The key of the caller, who may read records and requests.
Reader = Annotated[ApiKey, Depends(_reader)]
