"""Signed calls to AWS: HTTP, the JSON protocol, retries, and one module per service. It knows nothing of requests."""
