"""Schemas of bodies and responses, for the OpenAPI document only: `exactjson` reads and writes the JSON without rounding."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from mdstore.model import OpName

_REF = "#/components/schemas/{model}"
StateName = Literal["accepted", "running", "completed", "failed"]


class FieldError(BaseModel):
    """One error in a call."""

    index: int | None = Field(
        description="Zero-based index of the operation; null if the error is not in an operation."
    )
    field: str
    reason: str


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str = Field(examples=["urn:mdstore:problem:invalid-operations"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path that was called.")
    errors: list[FieldError] | None = Field(default=None, description="With 422: the first hundred errors.")
    count: int | None = Field(default=None, description="With 422: the number of all errors.")
    failing: list[str] | None = Field(default=None, description="From /readyz: the parts that failed.")


class OperationModel(BaseModel):
    """One intended change of one record."""

    op: OpName
    entity: str = Field(examples=["airport"])
    key: str = Field(examples=["KJFK"])
    data: dict[str, Any] | None = Field(default=None, description="Required for insert, update, patch and upsert.")
    expect_version: int | None = Field(default=None, ge=1)
    sequence: int | None = Field(
        default=None, description="Number that grows with the source's changes; an older one is refused."
    )
    group: str | None = Field(
        default=None, description="Operations with the same group all apply, or none does.", max_length=128
    )


class Operations(BaseModel):
    """A request's operations."""

    operations: list[OperationModel]


class Acknowledgement(BaseModel):
    """Confirms that the request is durable."""

    request_id: str
    status_url: str


class Summary(BaseModel):
    """A request's state and counts."""

    request_id: str
    state: StateName
    operations: int
    applied: int
    refused: int
    failed: int
    applied_by_op: dict[str, int]
    refused_by_reason: dict[str, int]


class Finished(Summary):
    """The request's final state, if the call waited for it."""

    status_url: str


class RequestState(Summary):
    """A request's state, its counts so far and its times."""

    source: str
    lanes: int
    accepted_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    error: str = Field(description="Why the request failed; empty otherwise.")


class OutcomeModel(BaseModel):
    """What became of one operation. Empty fields are left out."""

    index: int
    outcome: Literal["applied", "refused", "failed"]
    op: str = ""
    entity: str = ""
    key: str = ""
    reason: str = Field(default="", description="Why the operation was refused.")
    detail: str = ""


class OutcomePage(BaseModel):
    """A page of outcomes. The next page begins at `cursor`; null means that this is the last page."""

    outcomes: list[OutcomeModel]
    cursor: str | None


class RecordModel(BaseModel):
    """The current state of one key."""

    entity: str
    key: str
    version: int
    sequence: int | None = Field(default=None, description="Left out if the record has none.")
    data: dict[str, Any]
    updated_at: datetime
    updated_by: str = Field(description="request/lane/transaction")


class RecordPage(BaseModel):
    """A page of records. The next page begins at `cursor`; null means that this is the last page."""

    records: list[RecordModel]
    cursor: str | None
    read_limit_reached: bool = Field(
        description="The page is shorter than `limit`, because it has read as much as one page may."
    )


class Health(BaseModel):
    """The response of a healthy process."""

    status: Literal["ok"]


def schemas() -> dict[str, Any]:
    """Return, by name, the schemas that FastAPI cannot find: the body's, which FastAPI does not parse, and the problems'."""
    found: dict[str, Any] = {}
    for model in (Operations, Problem):
        schema = model.model_json_schema(ref_template=_REF)
        found |= {**schema.pop("$defs", {}), model.__name__: schema}
    return found
