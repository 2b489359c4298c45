"""What goes in and comes out, for the OpenAPI document only: `exactjson` reads and writes the bodies, and rounds nothing."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from mdstore.model import OpName

_REF = "#/components/schemas/{model}"
StateName = Literal["accepted", "running", "completed", "failed"]


class FieldError(BaseModel):
    """One thing that is wrong with a call."""

    index: int | None = Field(description="The operation's zero-based index, null where no operation is at fault.")
    field: str
    reason: str


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str = Field(examples=["urn:mdstore:problem:invalid-operations"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path that was called.")
    errors: list[FieldError] | None = Field(default=None, description="With 422: the first hundred flaws.")
    count: int | None = Field(default=None, description="With 422: how many flaws there are.")
    failing: list[str] | None = Field(default=None, description="Of /readyz: the parts that do not answer.")


class OperationModel(BaseModel):
    """One intended change of one record."""

    op: OpName
    entity: str = Field(examples=["airport"])
    key: str = Field(examples=["KJFK"])
    data: dict[str, Any] | None = Field(default=None, description="Of insert, update, patch and upsert.")
    expect_version: int | None = Field(default=None, ge=1)
    sequence: int | None = Field(default=None, description="Grows with the source's changes; an older one is refused.")
    group: str | None = Field(default=None, description="All operations of a group apply, or none.", max_length=128)


class Operations(BaseModel):
    """A request's operations."""

    operations: list[OperationModel]


class Acknowledgement(BaseModel):
    """The request is durable."""

    request_id: str
    status_url: str


class Summary(BaseModel):
    """A request in numbers."""

    request_id: str
    state: StateName
    operations: int
    applied: int
    refused: int
    failed: int
    applied_by_op: dict[str, int]
    refused_by_reason: dict[str, int]


class Finished(Summary):
    """The request's final state, for a call that waited for it."""

    status_url: str


class RequestState(Summary):
    """A request's state, with the counts so far."""

    source: str
    lanes: int
    accepted_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    error: str = Field(description="Why it failed; empty otherwise.")


class OutcomeModel(BaseModel):
    """What became of one operation. What is empty is left out."""

    index: int
    outcome: Literal["applied", "refused", "failed"]
    op: str = ""
    entity: str = ""
    key: str = ""
    reason: str = Field(default="", description="Of a refusal.")
    detail: str = ""


class OutcomePage(BaseModel):
    """A page of outcomes; the next one begins at `cursor`."""

    outcomes: list[OutcomeModel]
    cursor: str | None


class RecordModel(BaseModel):
    """The current state of one key."""

    entity: str
    key: str
    version: int
    sequence: int | None = Field(default=None, description="Left out where the record has none.")
    data: dict[str, Any]
    updated_at: datetime
    updated_by: str = Field(description="request/lane/transaction")


class RecordPage(BaseModel):
    """A page of records; the next one begins at `cursor`."""

    records: list[RecordModel]
    cursor: str | None


class Health(BaseModel):
    """An answer at all is the news."""

    status: Literal["ok"]


def schemas() -> dict[str, Any]:
    """The schemas, by name, that FastAPI does not find: of the body, which it does not parse, and of the problems."""
    found: dict[str, Any] = {}
    for model in (Operations, Problem):
        schema = model.model_json_schema(ref_template=_REF)
        found |= {**schema.pop("$defs", {}), model.__name__: schema}
    return found
