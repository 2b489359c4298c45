"""The digest of a registry of models: equal for equal models, and different for all that changes what a model accepts."""

from __future__ import annotations

import logging
import subprocess
import sys
from contextlib import closing
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mdstore.store.entities import Entities
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.validation import Validator
from tests.unit.test_payload import sized


def model(*, config: ConfigDict | None = None, upper: bool = False, **fields: Any) -> type[BaseModel]:
    """Make a model named `Thing`."""

    def checked(_: Any, value: str) -> str:
        return value.upper()

    body: dict[str, Any] = {"__annotations__": fields, "model_config": config or {}}
    if upper:
        body["upper"] = field_validator("name")(classmethod(checked))
    return type("Thing", (BaseModel,), body)


def digest(**models: type[BaseModel]) -> str:
    return Entities(models).digest


def test_equal_models_have_equal_digests() -> None:
    """Neither the order of entities nor the class's identity matters, nor the process."""
    assert digest(a=model(name=str), b=model(n=int)) == digest(b=model(n=int), a=model(name=str))
    script = "from mdstore.store.entities import load_entities; print(load_entities(['config.entities'], strict=False).digest)"
    found = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in "12"
    }
    assert len(found) == 1


CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": str},
    "type": {"name": int},
    "constraint": {"name": Annotated[str, Field(max_length=3)]},
    "another field": {"name": str, "other": str},
    "extra": {"name": str, "config": ConfigDict(extra="forbid")},
    "strict": {"name": str, "config": ConfigDict(strict=True)},
    "validator": {"name": str, "upper": True},
    "nested": {"name": model(n=int)},
    "nested otherwise": {"name": model(n=str)},
}


def test_a_change_of_a_model_changes_the_digest() -> None:
    """Each of these models accepts other data, or makes something else of it."""
    digests = [digest(thing=model(**change)) for change in CHANGES.values()]
    digests += [digest(other=model(name=str)), digest(thing=model(name=str), other=model(name=str)), Entities().digest]
    assert len(set(digests)) == len(digests)


def test_no_models_are_named() -> None:
    """A log line says it in words."""
    assert Entities().digest == "none"


class Odd:
    """A type that JSON Schema cannot express."""


def test_a_model_that_json_schema_cannot_express_has_a_digest() -> None:
    """Its fields still count."""
    config = ConfigDict(arbitrary_types_allowed=True)
    one, two = (digest(thing=fields) for fields in (model(config=config, a=Odd), model(config=config, b=Odd)))
    assert one != two
    assert one == digest(thing=model(config=config, a=Odd))


@pytest.mark.parametrize("models", [{}, {"thing": model(name=str)}])
def test_the_digest_is_in_the_payload(models: dict[str, type[BaseModel]]) -> None:
    """A worker reads it in the header."""
    entities = Entities(models)
    builder = PayloadBuilder(validator=Validator(entities=entities, max_record_bytes=2**20), settings=sized())
    with closing(builder), closing(builder.encode("r1", "shop").body) as body:
        assert f'"models":"{entities.digest}"'.encode() in body.read()


def test_other_models_are_reported_once_a_source(caplog: pytest.LogCaptureFixture) -> None:
    """Release 0.1.0 wrote no digest, so nothing is reported about its requests."""
    entities = Entities({"thing": model(name=str)})
    with caplog.at_level(logging.WARNING, "mdstore.events"):
        for source in ("erp", "crm", "erp"):
            for models in ("", entities.digest, "none"):
                entities.report_other_models(models, request_id="r", source=source)
    events = [record.mdstore for record in caplog.records if hasattr(record, "mdstore")]
    assert [(one["source"], one["models"], one["own"], one["entities"]) for one in events] == [
        (source, "none", entities.digest, "thing") for source in ("erp", "crm")
    ]
