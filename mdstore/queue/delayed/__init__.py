"""Delayed messages are due later than SQS can delay them: a table keeps them, and workers move them to their queues in time."""
