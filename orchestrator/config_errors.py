"""Words what is wrong with a configuration: the dotted key first, then the value, what is wanted and what to do."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dabnn.errors import InvalidInputError
from orchestrator.names import nearest

SPACE = "search.space"

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text, in quotes where it looks like a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "none_required": "null, the only value that this version supports",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "some text",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "given, with one entry at least",
}


def known_keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return dotted key -> field, sections and leaves, in the order of declaration."""
    return dict(_walk(model, ""))


def leaf_keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return dotted key -> field of the keys that are no sections."""
    keys = known_keys(model)
    sections = {key.rpartition(".")[0] for key in keys}
    return {key: field for key, field in keys.items() if key not in sections}


def unknown_key(key: str, keys: Mapping[str, FieldInfo]) -> InvalidInputError:
    """Return the error for a key that does not exist; it names the nearest of `keys` and those of the same section."""
    section = key.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in keys if section and name.rpartition(".")[0] == section]
    others = f" The keys of {section} are {', '.join(siblings)}." if siblings else ""
    candidates = [name for name in keys if not (siblings and name == section)]
    return InvalidInputError(f"{key}: unknown key; did you mean {nearest(key, candidates)}?{others}")


def invalid_config(model: type[BaseModel], error: ValidationError) -> InvalidInputError:
    """Return one error with a line for each thing that pydantic found wrong in a configuration of type `model`."""
    keys = known_keys(model)
    errors = _not_implied(error.errors(include_url=False))
    lines = (line for details in errors for line in _lines(details, keys | _item_keys(model, details["loc"])))
    return InvalidInputError("\n".join(dict.fromkeys(lines)))


def _not_implied(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out that a list is too short where an entry of it is wrong: wrong entries are not counted."""
    places = [details["loc"] for details in errors]
    return [
        details
        for details in errors
        if details["type"] != "too_short" or not any(_lies_in(place, details["loc"]) for place in places)
    ]


def _lies_in(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def value_problem(path: str, details: ErrorDetails, field: FieldInfo | None) -> str:
    """Return the line for one value that pydantic refused.

    Args:
        path: Dotted key that the line starts with.
        details: What pydantic says about it.
        field: The field with its description, where it is known.
    """
    kind, context = details["type"], details.get("ctx", {})
    about = f" ({field.description})" if field else ""
    if kind == "missing":
        by_option = "" if "[" in path else f", or pass --set {path}=..."
        return f"{path}: missing{about}. Add it to the file{by_option or '.'}"
    if kind == "value_error":
        return f"{path}: {show(details['input'])} {context['error']}{about}."
    wanted = _WANTED[kind].format(**context) if kind in _WANTED else details["msg"]
    if field and kind != "none_required" and type(None) in get_args(field.annotation):
        wanted += ", or null"
    return f"{path}: {show(details['input'])} must be {wanted}{about}."


def show(value: Any) -> str:
    """Return `value` as one short piece of YAML-like text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _walk(part, f"{prefix}{name}.")


def _item_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> dict[str, FieldInfo]:
    """Return the keys of the list item that an error lies in, under the item's own path; none outside lists."""
    if not any(isinstance(part, int) for part in location):
        return {}
    last = max(position for position, part in enumerate(location) if isinstance(part, int))
    found: type[BaseModel] | None = model
    for part in location[:last]:
        field = found.model_fields.get(part) if found and isinstance(part, str) else None
        found = next(_models_in(field.annotation), None) if field else None
    return dict(_walk(found, f"{_dotted(location[: last + 1])}.")) if found else {}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _dotted(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _lines(details: ErrorDetails, keys: Mapping[str, FieldInfo]) -> list[str]:
    path = _dotted(details["loc"])
    if details["type"] == "extra_forbidden":
        return [str(unknown_key(path, keys))]
    if not path:
        return [str(details.get("ctx", {}).get("error", details["msg"]))]
    required = [key for key in keys if key.startswith(f"{path}.") and keys[key].is_required()]
    if details["type"] == "missing" and required:
        return [value_problem(key, details, keys[key]) for key in required]
    return [value_problem(path, details, keys.get(path))]
