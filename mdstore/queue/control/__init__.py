"""Commands and events: fan-out over SNS, remote control, and the removal of stale queues."""
