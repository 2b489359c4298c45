"""Who calls: `Authorization: Bearer KEY`. No key is ever logged or echoed."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from mdstore.client import Client
from mdstore.store.api_keys import ApiKey, Scope

_bearer = HTTPBearer(auto_error=False, description="An API key; `mdstore up` makes and prints one.")


def client_of(request: Request) -> Client:
    """The client that the application was made with."""
    client: Client = request.app.state.client
    return client


TheClient = Annotated[Client, Depends(client_of)]


def _caller(client: TheClient, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> ApiKey:
    found = client.store.api_keys.find(credentials.credentials) if credentials else None
    if found is None:
        detail = "This needs an API key that is known here: Authorization: Bearer KEY."
        raise HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})
    return found


def _with(scope: Scope, key: ApiKey) -> ApiKey:
    if scope not in key.scopes:
        challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
        raise HTTPException(403, f"This needs a key with the scope {scope}.", headers={"WWW-Authenticate": challenge})
    return key


async def _writer(key: Annotated[ApiKey, Depends(_caller)]) -> ApiKey:
    return _with(Scope.WRITE, key)


async def _reader(key: Annotated[ApiKey, Depends(_caller)]) -> ApiKey:
    return _with(Scope.READ, key)


#: The key of a call that may submit requests.
Writer = Annotated[ApiKey, Depends(_writer)]
#: The key of a call that may read.
Reader = Annotated[ApiKey, Depends(_reader)]
