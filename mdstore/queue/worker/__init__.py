"""What this project adds to a Celery worker: its consumer, its requests, and what watches over it."""
