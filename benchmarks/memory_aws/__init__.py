"""A stand-in for AWS that is fast enough to measure this project and not an emulator: S3, SQS, SNS and DynamoDB in memory.

`python -m benchmarks.memory_aws PORT LATENCY_MS` serves all of them on one port, and answers each call after a set latency. It
implements the calls, conditions and errors that this project and its peers use; any other call is an error. It checks neither
signatures nor DynamoDB's limits.

`GET /_calls` returns how often each operation was called, and the write units of DynamoDB, as JSON.
"""
