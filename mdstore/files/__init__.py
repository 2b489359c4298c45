"""File formats that can be loaded: JSON Lines, CSV and Parquet.

A file holds either operations (JSON Lines) or rows, and `Rows` says how a row becomes an operation.
"""

from mdstore.files.reader import OperationFile, check_readable, read_operations
from mdstore.files.rows import FIELDS, Rows

__all__ = ["FIELDS", "OperationFile", "Rows", "check_readable", "read_operations"]
