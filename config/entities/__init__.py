"""The kinds of master records that this deployment knows: name -> pydantic model. Listed in `MDSTORE_ENTITIES`."""

from config.entities.airport import Airport

ENTITIES = {"airport": Airport}
