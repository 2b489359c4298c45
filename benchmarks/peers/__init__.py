"""Other tools for the same job, set up as their documentation says, each with two worker processes."""
