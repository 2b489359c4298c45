"""Entities: kinds of master records, each optionally bound to a pydantic model that validates its data.

A deployment lists modules in `MDSTORE_ENTITIES`. Each module defines `ENTITIES`, a mapping of entity name to model. A record
holds what the model makes of the data given, as `json_form` describes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from mdstore.errors import ConfigurationError
from mdstore.store.json_form import json_form

Model = type[BaseModel]
_MOST_PROBLEMS = 10_000  # of one record
FieldProblem = tuple[str, str]  # the field, and what is wrong with it


class Entities:
    """The registry of models by entity name. An entity without a model is accepted unless `strict`."""

    def __init__(self, models: Mapping[str, Model] = MappingProxyType({}), *, strict: bool = False) -> None:
        self._models = dict(models)
        self._strict = strict

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
            if error.error_count() > _MOST_PROBLEMS:  # listing them all would take many times the data's memory
                return data, [("data", f"the model of {entity!r} refuses {error.error_count()} of its values")]
            found = error.errors(include_url=False, include_context=False, include_input=False)
            return data, [(".".join(["data", *map(str, one["loc"])]), one["msg"]) for one in found]
        except Exception as error:
            return data, [("data", f"the model of {entity!r} raised {type(error).__name__}: {error}")]
        if not isinstance(form, dict):
            return data, [("data", f"the model of {entity!r} makes {type(form).__name__} of it, not a JSON object")]
        return form, []


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
