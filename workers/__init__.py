"""Process entry points: translate what starts a worker into the library's calls."""
