"""Authentication by `Authorization: Bearer KEY`. Keys are never logged and never part of a response."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from mdstore.async_client import AsyncClient
from mdstore.client import Client
from mdstore.store.api_keys import ApiKey, ApiKeys, Scope

_bearer = HTTPBearer(auto_error=False, description="An API key. `mdstore up` creates and prints one.")


async def client_of(request: Request) -> Client:
    """Return the application's client."""
    client: Client = request.app.state.client
    return client


async def async_client_of(request: Request) -> AsyncClient:
    """Return the application's client for coroutines."""
    client: AsyncClient = request.app.state.async_client
    return client


TheClient = Annotated[Client, Depends(client_of)]
TheAsyncClient = Annotated[AsyncClient, Depends(async_client_of)]


async def _caller(
    client: TheClient, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> ApiKey:
    found = await _find(client.store.api_keys, credentials.credentials) if credentials else None
    if found is None:
        detail = "Send a valid API key: Authorization: Bearer KEY."
        raise HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})
    return found


async def _find(api_keys: ApiKeys, key: str) -> ApiKey | None:
    return api_keys.cached(key) or await run_in_threadpool(api_keys.find, key)


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
