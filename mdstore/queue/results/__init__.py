"""The result backend stores the results of tasks and groups, and runs chords that survive duplicate deliveries."""
