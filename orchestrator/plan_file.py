"""Plan files: which layers have binary weights and which take binary inputs, as a YAML or JSON file.

    weights: [2, conv3, "stage[34].*"]
    inputs: [2, 3]

An entry is a selector of `dabnn.plans.resolve_selectors`; a key that is left out names no layer. The file is read when
a run is submitted, so that the run itself does not depend on it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dabnn.choices import unknown_choice
from dabnn.errors import DabError, InvalidInputError
from orchestrator.config_rules import check_selectors
from orchestrator.config_source import read_yaml

# Key of the file -> key of the plan that `dabnn.models.build` takes.
_KEYS = {"weights": "binary_weights", "inputs": "binary_inputs"}


def load_plan(path: Path) -> dict[str, list[int | str]]:
    """Return the plan that `build` takes: `{"binary_weights": selectors, "binary_inputs": selectors}`.

    Raises:
        InvalidInputError: The file cannot be read, is not YAML, or holds something else than lists of selectors.
    """
    value = read_yaml(path)
    if not isinstance(value, dict):
        raise InvalidInputError(f"{path}: is no plan. Write `weights: [2, 3]` and `inputs: [2, 3]`.")
    for key in value:
        if key not in _KEYS:
            raise unknown_choice(str(path), str(key), _KEYS)
    return {name: _selectors(f"{path}: {key}", value.get(key, [])) for key, name in _KEYS.items()}


def write_plan(path: Path, plan: Mapping[str, Iterable[int | str]], *, comments: Sequence[str] = ()) -> None:
    """Write a plan, given as `load_plan` returns it, as a YAML file with `comments` above it.

    Raises:
        DabError: The file cannot be written.
    """
    lines = [f"# {comment}".rstrip() for comment in comments]
    # JSON lists are YAML lists, and quote what YAML would take for something else.
    lines += [f"{key}: {json.dumps(list(plan[name]))}" for key, name in _KEYS.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise DabError(f"{path}: the plan cannot be written ({error}). Name a file elsewhere.") from error


def _selectors(field: str, value: Any) -> list[int | str]:
    if not isinstance(value, list):
        raise InvalidInputError(f"{field}: {value!r} is no list. Write numbers, paths or regular expressions in [].")
    try:
        check_selectors(value)
    except ValueError as error:
        raise InvalidInputError(f"{field}: {error}.") from None
    return value
