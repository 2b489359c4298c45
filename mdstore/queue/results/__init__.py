"""The result backend: results of tasks and groups, and chords that survive duplicates."""
