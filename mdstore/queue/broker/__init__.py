"""The way of a message: published, received, held while it is worked on, and settled."""
