"""Entities: kinds of master records, each optionally bound to a pydantic model that validates its data.

A deployment lists modules in `MDSTORE_ENTITIES`. Each module defines `ENTITIES`, a mapping of entity name to model. A record
holds what the model makes of the data given, as `json_form` describes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from mdstore.errors import ConfigurationError
from mdstore.log import event
from mdstore.store.json_form import json_form

Model = type[BaseModel]
_MOST_PROBLEMS = 10_000  # of one record
FieldProblem = tuple[str, str]  # the field, and what is wrong with it


class Entities:
    """The registry of models by entity name. An entity without a model is accepted unless `strict`."""

    def __init__(self, models: Mapping[str, Model] = MappingProxyType({}), *, strict: bool = False) -> None:
        self._models = dict(models)
        self._strict = strict
        self._reported: set[tuple[str, str]] = set()

    @cached_property
    def digest(self) -> str:
        """The digest of all models, or "none". Models that differ only in the code of a validator have the same digest."""
        if not self._models:
            return "none"
        text = json.dumps({name: _description(model) for name, model in self._models.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def matches(self, digest: str) -> bool:
        """Return whether a request with this digest was checked against these models. "" (release 0.1.0) counts as a match."""
        return digest in ("", self.digest)

    def report_other_models(self, digest: str, *, request_id: str, source: str) -> None:
        """Log a warning if a request was checked against other models than these, once for each digest of a source."""
        if self.matches(digest) or (digest, source) in self._reported:
            return
        self._reported.add((digest, source))
        event(
            "request.other_models",
            level=logging.WARNING,
            request_id=request_id,
            source=source,
            models=digest,
            own=self.digest,
            entities=",".join(self.bound),
        )

    @property
    def bound(self) -> list[str]:
        """The names of the entities that have a model."""
        return sorted(self._models)

    def problems(self, entity: str) -> list[FieldProblem]:
        """Return a problem if the deployment accepts only entities that have a model, and `entity` has none."""
        is_refused = self._strict and entity not in self._models
        return [("entity", f"{entity!r} is not bound to a model")] if is_refused else []

    def validated(self, entity: str, data: dict[str, Any]) -> tuple[dict[str, Any], list[FieldProblem]]:
        """Return what the entity's model makes of a whole record's data, in JSON form, and all problems that it finds."""
        model = self._models.get(entity)
        if model is None:
            return data, []
        try:
            form = json_form(model.model_validate(data), data)
        except ValidationError as error:
            if error.error_count() > _MOST_PROBLEMS:  # listing them all would take many times the memory of the data
                return data, [("data", f"the model of {entity!r} refuses {error.error_count()} of its values")]
            found = error.errors(include_url=False, include_context=False, include_input=False)
            return data, [(".".join(["data", *map(str, one["loc"])]), one["msg"]) for one in found]
        except Exception as error:
            return data, [("data", f"the model of {entity!r} raised {type(error).__name__}: {error}")]
        if not isinstance(form, dict):
            return data, [("data", f"the model of {entity!r} makes {type(form).__name__} of it, not a JSON object")]
        return form, []


def _description(model: Model) -> dict[str, Any]:
    """Return what decides which data a model accepts, as far as it is not the code of a validator."""
    try:
        fields: Any = model.model_json_schema()
    except PydanticInvalidForJsonSchema:  # it has a field of a type that JSON Schema cannot express
        fields = {name: str(field.annotation) for name, field in model.model_fields.items()}
    decorators = model.__pydantic_decorators__
    return {
        "fields": fields,
        "config": {name: value for name, value in model.model_config.items() if isinstance(value, bool | int | str)},
        "validators": sorted({*decorators.field_validators, *decorators.model_validators, *decorators.validators}),
    }


def load_entities(modules: Iterable[str], *, strict: bool) -> Entities:
    """Import `modules`, given by dotted names and also from the working directory, and merge their `ENTITIES`.

    Raises `ConfigurationError` if a module is missing, has no `ENTITIES`, or binds an entity that is already bound.
    """
    models: dict[str, Model] = {}
    for name in modules:
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        try:
            bound = importlib.import_module(name).ENTITIES
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(
                key="entities", value=name, expected=f"a module with ENTITIES = {{name: model}} ({error})"
            ) from error
        if taken := models.keys() & bound.keys():
            raise ConfigurationError(key="entities", value=name, expected=f"names not bound before: {sorted(taken)}")
        models.update(bound)
    return Entities(models, strict=strict)
