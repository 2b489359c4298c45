"""Formats that are loaded: JSON Lines as they are, rows of CSV and Parquet files as one operation each."""

from mdstore.files.reader import read_operations

__all__ = ["read_operations"]
