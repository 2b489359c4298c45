"""Commands and events reach all workers over SNS; each process removes the queues that dead processes left behind."""
