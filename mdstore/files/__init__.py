"""File formats that can be loaded: JSON Lines of operations, and CSV and Parquet tables, whose rows become operations."""

from mdstore.files.reader import read_operations

__all__ = ["read_operations"]
