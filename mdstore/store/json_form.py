"""The JSON form of what a pydantic model makes of a record's data.

This is pydantic's JSON form with three differences, so that nothing is lost. Decimals stay exact numbers, where pydantic writes
text. Fields that a model ignores stay as given, where pydantic drops them. Sets are sorted, so that equal data has equal bytes.
Defaults are not filled in: a record has the fields that were given and those that the model's validators set.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from typing import Any

from pydantic import AliasChoices, AliasPath, BaseModel, RootModel

from mdstore import exactjson


def json_form(made: BaseModel, given: dict[str, Any]) -> Any:
    """Return the JSON form of `made`, which a model made of `given`."""
    return _form(made.model_dump(mode="json", by_alias=True, exclude_unset=True), made, given)


def _form(form: Any, made: Any, given: Any) -> Any:  # noqa: PLR0911  one return per type
    """Return `form`, pydantic's JSON of `made`, with exact numbers, with the ignored fields of `given`, and sorted."""
    if isinstance(made, RootModel):
        return _form(form, made.root, given)
    if isinstance(made, BaseModel):
        return _object(form, made, given) if isinstance(form, dict) and isinstance(given, dict) else form
    if isinstance(made, Decimal | float):
        return made if form is None or isinstance(form, str) else form  # None stands for NaN, which validation refuses
    if isinstance(made, set | frozenset) and isinstance(form, list):
        return sorted(form, key=exactjson.canonical)
    if isinstance(made, list | tuple) and isinstance(form, list) and len(form) == len(made):
        pairs = given if isinstance(given, list | tuple) and len(given) == len(form) else [None] * len(form)
        return [_form(*one) for one in zip(form, made, pairs, strict=True)]
    if isinstance(made, dict) and isinstance(form, dict) and len(form) == len(made):
        sources = given if isinstance(given, dict) else {}
        return {
            name: _form(item, value, sources.get(name))
            for (name, item), value in zip(form.items(), made.values(), strict=True)
        }
    return form


def _object(form: dict[str, Any], made: BaseModel, given: dict[str, Any]) -> dict[str, Any]:
    fields = _names(type(made))
    known: set[str] = set()
    for name, (target, sources) in fields.items():
        known.update(sources)
        if target in form:
            source = next((given[one] for one in sources if one in given), None)
            form[target] = _form(form[target], getattr(made, name), source)
    for name, value in (made.model_extra or {}).items():
        if name in form:
            form[name] = _form(form[name], value, given.get(name))
    if made.model_extra is None:  # the model ignores unknown names; one that forbids them has refused them
        form |= {name: value for name, value in given.items() if name not in known and name not in form}
    return {name: form[name] for name in given if name in form} | form  # in the order given


@lru_cache(maxsize=1_024)
def _names(model: type[BaseModel]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return, for each field of a model, its name in JSON, and the names under which it may be given."""
    config = model.model_config
    by_name = config.get("populate_by_name") or config.get("validate_by_name")
    found = {}
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [name if alias is None else alias]
        sources = [str(one.path[0]) if isinstance(one, AliasPath) else one for one in choices]
        found[name] = (field.serialization_alias or name, (*sources, *([name] if by_name else [])))
    return found
