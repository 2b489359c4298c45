"""The front door: requests in, states, outcomes and records out, over HTTP."""

from mdstore.api.app import create_api

__all__ = ["create_api"]
