"""Entities: kinds of master records, each optionally bound to a pydantic model that validates its data.

A deployment lists modules in `MDSTORE_ENTITIES`. Each module defines `ENTITIES`, a mapping of entity name to model. A model
only checks data: records keep the data as given, without defaults filled in or types coerced.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ValidationError

from mdstore.errors import ConfigurationError
from mdstore.model import Operation
from mdstore.store.operations import OPERATIONS, Effect

Model = type[BaseModel]


class Entities:
    """The registry of models by entity name. An entity without a model is accepted unless `strict`."""

    def __init__(self, models: Mapping[str, Model] = MappingProxyType({}), *, strict: bool = False) -> None:
        self._models = dict(models)
        self._strict = strict

    @property
    def bound(self) -> list[str]:
        """The names of the entities that have a model."""
        return sorted(self._models)

    def problem(self, operation: Operation) -> tuple[str, str] | None:
        """Return `(field, why)` if the operation's data does not fit its entity's model, else None.

        A patch is not a whole record, so it passes here; the writer checks the merged record.
        """
        model = self._models.get(operation.entity)
        if model is None:
            return ("entity", f"{operation.entity!r} is not bound to a model") if self._strict else None
        if operation.data is None or OPERATIONS[operation.op].effect is Effect.MERGE:
            return None
        try:
            model.model_validate(operation.data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            return ".".join(["data", *map(str, first["loc"])]), first["msg"]
        except Exception as error:
            return "data", f"the model of {operation.entity!r} raised {type(error).__name__}: {error}"
        return None


def load_entities(modules: Iterable[str], *, strict: bool) -> Entities:
    """Import `modules`, given by dotted names and also from the working directory, and merge their `ENTITIES`.

    Raises `ConfigurationError` where a module is missing, has no `ENTITIES`, or binds an entity that is already bound.
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
