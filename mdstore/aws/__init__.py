"""Signed calls to AWS: HTTP, JSON protocol, retries, and one module a service. Knows nothing of requests or operations."""
