"""A FastAPI service that submits operations to mdstore."""
