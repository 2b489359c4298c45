"""Measures speed side by side with other tools in one run: `make bench`, or `python -m benchmarks NAME --json`."""
