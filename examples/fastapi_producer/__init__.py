"""A FastAPI service that hands operations to mdstore."""
