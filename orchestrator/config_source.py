"""Reads configuration text: a YAML file and `--set key=value`. What the keys mean is in `orchestrator.config`."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dabnn.errors import InvalidInputError
from orchestrator.config_errors import SPACE, known_keys, unknown_key


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `1e-3` is a number, `no` and `2026-01-01` are text. No key may repeat."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base class shares its own; this one starts empty)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for position, name in enumerate(names):
            if name in names[:position]:
                problem = f"the key {name!r} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML in which text is quoted that either version takes for something else: `0E0` is text in 1.1 only."""


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def yaml_text(value: dict[str, Any]) -> str:
    """Return a mapping as YAML that `read_mapping` reads back as an equal one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML configuration holds.

    Raises:
        InvalidInputError: The file cannot be read, is not YAML, or holds something else than a mapping.
    """
    value = read_yaml(path)
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise InvalidInputError(f"{path}: {found}; a configuration is a mapping of keys, starting with `name: ...`.")
    return value


def read_yaml(path: Path) -> Any:
    """Return the value that a YAML (or JSON) file holds; None for an empty one.

    Raises:
        InvalidInputError: The file cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidInputError(f"{path}: no such file. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read as text ({error}).") from error
    return _parse(str(path), text)


def parse_override(text: str) -> tuple[str, Any]:
    """Return the dotted key and the value, parsed as YAML, of one `--set key=value`.

    Raises:
        InvalidInputError: There is no `=`, no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InvalidInputError(f"--set {text}: needs a key and a value. Write it as --set train.epochs=10.")
    return key.strip(), _parse(f"--set {text}", value)


def assign(model: type[BaseModel], raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` of the nested mapping `raw`, making the sections on the way.

    Args:
        model: The configuration model whose keys exist.
        raw: Changed in place.
        key: Dotted key; below `search.space` all that follows is one key.
        value: Takes the place of what stood there.

    Raises:
        InvalidInputError: There is no such key.
    """
    inside_space = key.startswith(f"{SPACE}.")
    if not inside_space and key not in known_keys(model):
        raise unknown_key(key, known_keys(model))
    parts = [*SPACE.split("."), key.removeprefix(f"{SPACE}.")] if inside_space else key.split(".")
    for part in parts[:-1]:
        if not isinstance(raw.get(part), dict):
            raw[part] = {}
        raw = raw[part]
    raw[parts[-1]] = value


def _parse(source: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InvalidInputError(f"{source}: not valid YAML{place}: {problem}.") from error
