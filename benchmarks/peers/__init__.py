"""What others use for the same job, set up as their documentation says and with the same two worker processes."""
