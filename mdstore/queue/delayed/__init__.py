"""Messages due later than SQS can delay them: the table that keeps them, and what moves them to their queues."""
