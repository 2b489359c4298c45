"""Schemas of bodies and responses, for the OpenAPI document only: `exactjson` reads and writes the JSON without rounding."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, Field

from mdstore.model import MAX_REQUEST_ID, REQUEST_ID, REST_OF_REQUEST_ID
from mdstore.store.operations import OPERATIONS, OperationSpec
from mdstore.store.validation import ENTITY, MAX_GROUP_CHARACTERS, MAX_KEY_BYTES, MAX_SEQUENCE

_REF = "#/components/schemas/{model}"
StateName = Literal["accepted", "running", "completed", "failed"]

# What this package checks itself is documented here without being checked by FastAPI, whose messages are harder to read.
ENTITY_SCHEMA: dict[str, Any] = {"type": "string", "pattern": f"^{ENTITY.pattern}$"}
KEY_SCHEMA: dict[str, Any] = {
    "type": "string",
    "description": f"At most {MAX_KEY_BYTES} bytes in UTF-8.",
    "pattern": r"^[^\u0000-\u001f\u007f]+$",
    "maxLength": MAX_KEY_BYTES,
}
REQUEST_ID_SCHEMA: dict[str, Any] = {"pattern": f"^{REQUEST_ID.pattern}$", "maxLength": MAX_REQUEST_ID}
_LONGEST_REST = MAX_REQUEST_ID - len("s:")  # with the shortest source
IDEMPOTENCY_KEY_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": f"^{REST_OF_REQUEST_ID.pattern}$", "maxLength": _LONGEST_REST},
        {"type": "string", "pattern": f'^"{REST_OF_REQUEST_ID.pattern}"$', "maxLength": _LONGEST_REST + 2},
    ]
}

EntityPath = Annotated[str, Path(json_schema_extra=ENTITY_SCHEMA)]
KeyPath = Annotated[str, Path(json_schema_extra=KEY_SCHEMA)]
RequestIdPath = Annotated[
    str, Path(description="It may contain `/`, also encoded as `%2F`.", json_schema_extra=REQUEST_ID_SCHEMA)
]


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


class Health(BaseModel):
    """The response of a healthy process."""

    status: Literal["ok"]


_VALUE: dict[str, Any] = {
    "description": "Any JSON. Numbers have at most 38 significant digits, and magnitudes from 1E-130 to 9.9E+125. Objects and"
    " arrays have at most 31 levels.",
    "anyOf": [
        {"type": ["null", "boolean", "string", "number"]},
        {"type": "array", "items": {"$ref": _REF.format(model="Value")}},
        {"$ref": _REF.format(model="Data")},
    ],
}
_DATA: dict[str, Any] = {
    "type": "object",
    "propertyNames": {"minLength": 1},
    "additionalProperties": {"$ref": _REF.format(model="Value")},
}


def _operation(op: str, spec: OperationSpec) -> dict[str, Any]:
    """Return the schema of one kind of operation. A field that it does not take may be null."""
    version = {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": MAX_SEQUENCE,
        "description": "Written without a fraction.",
    }
    sequence = {
        "type": ["integer", "null"],
        "minimum": -MAX_SEQUENCE,
        "maximum": MAX_SEQUENCE,
        "description": "Number that grows with the source's changes, written without a fraction; an older one is refused.",
    }
    return {
        "type": "object",
        "properties": {
            "op": {"const": op},
            "entity": {**ENTITY_SCHEMA, "examples": ["airport"]},
            "key": {**KEY_SCHEMA, "examples": ["KJFK"]},
            "data": {"$ref": _REF.format(model="Data")} if spec.needs_data else {"type": "null"},
            "expect_version": version if spec.takes_version else {"type": "null"},
            "sequence": sequence if spec.takes_sequence else {"type": "null"},
            "group": {
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": MAX_GROUP_CHARACTERS,
                "description": "Operations with the same group all apply, or none does. At most 99, each on its own key.",
            },
        },
        "required": ["op", "entity", "key", *(["data"] if spec.needs_data else [])],
        "additionalProperties": False,
    }


def schemas() -> dict[str, Any]:
    """Return, by name, the schemas that FastAPI cannot find: the body's, which FastAPI does not parse, and the problems'."""
    problem = Problem.model_json_schema(ref_template=_REF)
    return {
        **problem.pop("$defs"),
        "Problem": problem,
        "Value": _VALUE,
        "Data": _DATA,
        "Operation": {
            "description": "One intended change of one record.",
            "oneOf": [_operation(op, spec) for op, spec in OPERATIONS.items()],
        },
        "Operations": {
            "description": "A request's operations.",
            "type": "object",
            "properties": {
                "operations": {"type": "array", "items": {"$ref": _REF.format(model="Operation")}, "minItems": 1}
            },
            "required": ["operations"],
            "additionalProperties": False,
        },
    }
