"""The HTTP API: clients submit requests, and read states, outcomes and records."""

from mdstore.api.app import create_api

__all__ = ["create_api"]
