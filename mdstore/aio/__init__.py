"""Reads for asyncio: coroutines that ask at the same time share their calls to AWS, and no thread waits for those."""
