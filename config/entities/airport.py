"""The model of airports, with the fields of the PyPI package airportsdata."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Airport(BaseModel):
    """Validates these fields where they are present; other fields are accepted as they are."""

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=False)

    icao: str | None = None
    iata: Annotated[str, Field(pattern=r"^([A-Z0-9]{3})?$")] | None = None
    name: str | None = None
    city: str | None = None
    country: Annotated[str, Field(pattern=r"^([A-Z]{2})?$")] | None = None
    elevation: Annotated[float, Field(ge=-2_000, le=30_000)] | None = None  # feet
    lat: Annotated[float, Field(ge=-90, le=90)] | None = None
    lon: Annotated[float, Field(ge=-180, le=180)] | None = None
    tz: str | None = None
