"""What a point of a search space is: which keys it has, how it is drawn, and the grid of all points. Pure functions.

A trial of Optuna draws a point key by key (define-by-run), so that every point can be run:

- `binarize.bin_end` is never below `binarize.bin_start`. Where the two ranges overlap, what is drawn for the end is a
  number f in 0..1, and of the n ends that the start leaves, the one at place floor(n f) is taken. So each parameter
  keeps its distribution from trial to trial, which samplers that model the space as a whole need (Gaussian process,
  CMA-ES, multivariate TPE); a range that moved with the start would be left out by them.
- A key that only some values of another one make sense of (`orchestrator.config_needs`) is drawn after that one, and
  only for those values: `schedule.interval` with `decay` only.
- A subset is one yes or no for each of its entries.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dabnn.errors import InvalidInputError
from orchestrator.config_needs import NEEDS, is_looked_at
from orchestrator.config_search import Domain
from orchestrator.config_space import END, START, num_points, subset_value

Space = Mapping[str, Domain]


def draw(trial: Any, space: Space) -> dict[str, Any]:
    """Return a point, dotted key -> value, drawn by an Optuna trial."""
    values: dict[str, Any] = {}
    for key in drawing_order(space):
        if is_looked_at(key, space, values):
            values[key] = _drawn(trial, key, space, values)
    return values


def parameters(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with which an Optuna trial draws `values`; a value outside of the space is left out."""
    found: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for key in drawing_order(space):
        if key in values and is_looked_at(key, space, known):
            written = _written(key, space, values[key], known)
            found |= written
            known |= {key: values[key]} if written else {}
    return found


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Yield every point of a space of choices, subsets and integers, the last key of `drawing_order` fastest.

    Raises:
        InvalidInputError: A range is continuous.
    """
    return _grid(space, drawing_order(space), {})


def drawing_order(space: Space) -> list[str]:
    """Return the keys of a space, each after those that decide whether it is looked at, and the end after the start."""
    waiting, placed = list(space), list[str]()
    while waiting:
        key = next(key for key in waiting if all(first in placed for first in _before(key, space)))
        waiting.remove(key)
        placed.append(key)
    return placed


def _before(key: str, space: Space) -> list[str]:
    first = [need.selector for need in NEEDS if key in need.keys] + ([START] if key == END else [])
    return [other for other in first if other in space]


def _drawn(trial: Any, key: str, space: Space, values: Mapping[str, Any]) -> Any:
    domain = space[key]
    if domain.kind == "choice":
        return _plain(domain.values[_labels(domain).index(trial.suggest_categorical(key, _labels(domain)))])
    if domain.kind == "subset":
        is_in = [trial.suggest_categorical(f"{key}[{entry}]", [False, True]) for entry in domain.values]
        return subset_value(key, itertools.compress(domain.values, is_in))
    low, high = domain.ends
    if _is_relative(key, space):
        ends = _ends_left(domain, values[START])
        return ends[min(int(len(ends) * trial.suggest_float(key, 0.0, 1.0)), len(ends) - 1)]
    if domain.kind == "int":
        return trial.suggest_int(key, int(low), int(high))
    return trial.suggest_float(key, low, high, log=domain.kind == "log")


def _written(key: str, space: Space, value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    domain = space[key]
    if domain.kind == "choice":
        choices = [_plain(each) for each in domain.values]
        return {key: _labels(domain)[choices.index(_plain(value))]} if _plain(value) in choices else {}
    if domain.kind == "subset":
        chosen = [] if value == "none" else value
        if not isinstance(chosen, list | tuple) or not set(chosen) <= set(domain.values):
            return {}
        return {f"{key}[{entry}]": entry in chosen for entry in domain.values}
    low, high = domain.ends
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return {}
    if not _is_relative(key, space):
        return {key: value}
    ends = _ends_left(domain, known[START]) if START in known else range(0)
    return {key: (ends.index(int(value)) + 0.5) / len(ends)} if value in ends else {}


def _is_relative(key: str, space: Space) -> bool:
    """Whether the key is the end of a range of layers that a start drawn before may cut."""
    if key != END or START not in space or space[END].kind != "int":
        return False
    return any(start is not None and start > space[END].ends[0] for start in space[START].values)  # type: ignore[operator]


def _ends_left(domain: Domain, start: int | None) -> range:
    low, high = domain.ends
    return range(max(int(low), start or 0), int(high) + 1)


def _labels(domain: Domain) -> list[Any]:
    """Return the values of a choice as Optuna takes them; lists and mappings as JSON text."""
    if all(value is None or isinstance(value, str | int | float) for value in domain.values):
        return list(domain.values)
    return [json.dumps(value) for value in domain.values]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _grid(space: Space, keys: Sequence[str], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not keys:
        yield values
        return
    key, *rest = keys
    if not is_looked_at(key, space, values):
        yield from _grid(space, rest, values)
        return
    for value in _grid_values(key, space[key]):
        if key != END or values.get(START) is None or value is None or value >= values[START]:
            yield from _grid(space, rest, values | {key: value})


def _grid_values(key: str, domain: Domain) -> Iterator[Any]:
    if num_points(domain) is None:
        raise InvalidInputError(
            f"search.space.{key}: a grid has no points for a {domain.kind} range. List them: {{choice: [...]}}."
        )
    if domain.kind == "int":
        low, high = domain.ends
        yield from range(int(low), int(high) + 1)
    elif domain.kind == "choice":
        yield from (_plain(value) for value in domain.values)
    else:
        for is_in in itertools.product([False, True], repeat=len(domain.values)):
            yield subset_value(key, itertools.compress(domain.values, is_in))
