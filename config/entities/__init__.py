"""The pydantic models of this deployment's entities, by name. The setting `entities` lists this module."""

from config.entities.airport import Airport

ENTITIES = {"airport": Airport}
