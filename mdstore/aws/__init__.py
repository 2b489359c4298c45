"""Signed calls to AWS: HTTP, the JSON protocol, retries, and one module per service. It knows no requests or operations."""
