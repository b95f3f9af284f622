"""Judges the search space of a configuration: its axes one by one, and every point of it by the rules for a run.

A search must obey `orchestrator.config_rules` at every point, in every stage, so that no trial fails on a combination
that could have been refused before the first one started. Pure functions, no effects. What only a built network can
tell is tried by `orchestrator.resolve`.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, create_model

from orchestrator.config_errors import SPACE, known_keys, leaf_keys, show, unknown_key, value_problem
from orchestrator.config_goals import goal_problems
from orchestrator.config_needs import NEEDS
from orchestrator.config_stages import overlaid, place

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config_rules import Rule
    from orchestrator.config_search import Domain, Search

_PLAN = "binarize.plan"
START, END = "binarize.bin_start", "binarize.bin_end"
_NOT_SEARCHABLE = (
    "name", "model.num_classes", "data.train", "data.val", "data.mean", "data.std",
    "data.cache_folder", "data.cache_gb", "data.retry_s", "data.decoded_cache_gb",
    "train.init_from", "train.checkpoint", "train.distill", "train.kurtosis", "train.stages",
    "cluster", "storage", "tracking", "search", "binarize.plan.weights", "binarize.plan.inputs",
)  # fmt: skip
# An integer axis up to this long is tried value by value, a longer one at its two ends.
_MAX_VALUES = 256
# A grid is counted up to so many points.
_MAX_GRID = 100_000
RANGES = ("int", "float", "log")
# Of a large space, so many corners are looked at, and a point that holds a value is drawn so often until it can be.
_MAX_CORNERS, _MAX_DRAWS = 4096, 50


def space_problems(config: "Config", search: "Search", rules: Sequence["Rule"]) -> list[str]:
    """Return what is wrong with a search: its axes, the points of its space by `rules`, its own keys."""
    problems = [problem for key, domain in search.space.items() if (problem := _axis_problem(config, key, domain))]
    if not problems:
        problems = [problem for rule in rules if (problem := _space_problem(config, search, rule))]
        problems += _stages_in_search(config, search)
        problems += [problem for key in search.space if (problem := _never_looked_at(search, key))]
        problems += [problem for check in (_grid, _cmaes) if (problem := check(search))]
    return problems + goal_problems(config, search)


def _stages_in_search(config: "Config", search: "Search") -> Iterator[str]:
    if config.train.stages is None:
        return
    if search.epochs is not None:
        yield f"search.epochs: {search.epochs}, but with train.stages each stage has its own. Leave it out."
    if search.early_stop is not None:
        yield (
            f"search.early_stop: {search.early_stop} would end trials in an early stage, whose accuracy says little of "
            "the last one's, and rank them by it. Write none."
        )
    for key, domain in search.space.items():
        trials = [_with_values(config, {key: value}) for value in _samples(key, domain)]
        if all(_staged(trial) == _staged(trials[0]) for trial in trials):
            yield f"{SPACE}.{key}: each stage in train.stages sets its own, so trials would not differ. Remove it."


def _axis_problem(config: "Config", key: str, domain: "Domain") -> str | None:
    if key in known_keys(type(config)) and _is_fixed(key):
        return f"{SPACE}.{key}: cannot differ between the trials of a search. Set {key} itself."
    searchable = {leaf: field for leaf, field in leaf_keys(type(config)).items() if not _is_fixed(leaf)}
    searchable |= {_PLAN: known_keys(type(config))[_PLAN]}
    if key not in searchable:
        return f"{SPACE}.{unknown_key(key, searchable)}"
    if key == "train.epochs" and config.search and config.search.epochs:
        return (
            f"{SPACE}.{key}: search.epochs={config.search.epochs} already sets it for each trial. Remove one of them."
        )
    field = searchable[key]
    # A model of its own, as the rules of the configuration for what a number and a list is are those of its models.
    axis = create_model("Axis", __config__=type(config).model_config, value=(field.annotation, field))  # type: ignore[arg-type] # a field of a model has one
    for value in [domain.values] if domain.kind == "subset" else domain.values:
        try:
            axis.model_validate_json(json.dumps({"value": value}))
        except ValidationError as error:
            return value_problem(f"{SPACE}.{key}", error.errors()[0], field)
    return None


def _never_looked_at(search: "Search", key: str) -> str | None:
    for need in NEEDS:
        domain = search.space.get(need.selector)
        if key not in need.keys or domain is None or any(need.is_met(v) for v in _samples(need.selector, domain)):
            continue
        offered = ", ".join(show(value) for value in domain.values)
        return (
            f"{SPACE}.{key}: has no effect with any {need.selector} of the space ({offered}). Remove it{need.instead}."
        )
    return None


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in _NOT_SEARCHABLE)


def _space_problem(config: "Config", search: "Search", rule: "Rule") -> str | None:
    axes = [key for key in rule.keys if key in search.space]
    for point in points(search, axes) if axes else ():
        trial = _with_values(config, point)
        for where, part in [("", trial), *_staged(trial)]:
            if problem := rule.problem(part):
                return point_problem(point, where + problem)
    return None


def _staged(config: "Config") -> list[tuple[str, "Config"]]:
    return [
        (place(position, stage), overlaid(config, stage)) for position, stage in enumerate(config.train.stages or ())
    ]


def point_problem(point: Mapping[str, Any], problem: str) -> str:
    """Return the line for what a trial at `point` would meet."""
    chosen = ", ".join(f"{key}={show(value)}" for key, value in point.items())
    return f"{SPACE}: a trial could get {chosen}. {problem} Or narrow the space."


def points(search: "Search", axes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the points that a search can reach on `axes`, as far as they decide whether a rule holds."""
    samples = {key: _samples(key, search.space[key]) for key in axes}
    for values in itertools.product(*samples.values()):
        point = dict(zip(axes, values, strict=True))
        if _is_drawn(search, point, samples):
            yield point


def _is_drawn(search: "Search", point: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a search may try `point`: it draws the end of the layers from what the start leaves, if that is any."""
    if not ({START, END} <= set(point) and (search.algorithm == "grid" or search.space[END].kind == "int")):
        return True
    return not bin_range_is_empty(point[START], point[END]) or point[START] > max(samples[END])


def sampled_points(search: "Search", axes: Sequence[str], limit: int) -> Iterator[dict[str, Any]]:
    """Yield up to `limit` points that a search can reach on `axes`: all of them, or else corners and drawn ones.

    Of a space with more points: first some of those at the ends of ranges, then one for each single value, the rest of
    it drawn; the same ones each time.
    """
    samples = {key: _samples(key, search.space[key]) for key in axes}
    if math.prod(len(values) for values in samples.values()) <= limit:
        yield from points(search, axes)
        return
    random = Random(0)
    ends = [(values[0], values[-1]) if search.space[key].kind in RANGES else values for key, values in samples.items()]
    corners = itertools.islice(itertools.product(*ends), _MAX_CORNERS)
    chosen = [dict(zip(axes, corner, strict=True)) for corner in corners]
    random.shuffle(chosen)
    chosen = [point for point in chosen if _is_drawn(search, point, samples)][: limit // 2]
    for key, values in samples.items():
        for value in values:
            drawn = ({other: random.choice(samples[other]) for other in axes} | {key: value} for _ in range(_MAX_DRAWS))
            chosen += itertools.islice((point for point in drawn if _is_drawn(search, point, samples)), 1)
    yield from itertools.islice((point for number, point in enumerate(chosen) if point not in chosen[:number]), limit)


def bin_range_is_empty(start: int | None, end: int | None) -> bool:
    """Whether both ends of the range of binary layers are given and leave no layer."""
    return start is not None and end is not None and start > end


def num_points(domain: "Domain") -> int | None:
    """Return how many values a domain has; None for a continuous one."""
    if domain.int_:
        return domain.int_[1] - domain.int_[0] + 1
    if domain.kind == "subset":
        return int(2 ** len(domain.values))
    return len(domain.values) if domain.kind == "choice" else None


def subset_value(key: str, chosen: Iterable[Any]) -> Any:
    """Return the value of a list of layers that a trial has of a subset; no binary inputs are written `none`."""
    layers = list(chosen)
    return layers if layers or key != "binarize.inputs" else "none"


def _samples(key: str, domain: "Domain") -> tuple[Any, ...]:
    """Return the values of an axis that decide whether a rule holds: of a long range its ends, of a subset few."""
    if domain.kind == "subset":
        some = [domain.values, (), *((value,) for value in domain.values)]
        return tuple(subset_value(key, each) for each in some)
    if domain.int_ is None:
        return domain.values
    low, high = domain.int_
    return tuple(range(low, high + 1)) if high - low < _MAX_VALUES else domain.int_


def _with_values(config: "Config", values: Mapping[str, Any]) -> "Config":
    """Return an unvalidated copy of `config` with leaves of its sections replaced."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(section: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    return section.model_copy(update={first: _replaced(getattr(section, first), rest, value) if rest else value})


def _grid(search: "Search") -> str | None:
    if search.algorithm != "grid":
        return None
    for key, domain in search.space.items():
        if num_points(domain) is None:
            return f"{SPACE}.{key}: {domain.kind} has no end of values, and a grid visits each. Use choice, or tpe."
    from orchestrator.points import grid  # it knows domains, which this module is imported for

    size = sum(1 for _ in itertools.islice(grid(search.space), max(_MAX_GRID, search.num_trials + 1)))
    if size <= search.num_trials:
        return None
    size_text = f"{size}" if size < _MAX_GRID else f"{size} or more"
    return f"search.num_trials: {search.num_trials} is less than the {size_text} points of the grid. Raise it."


def _cmaes(search: "Search") -> str | None:
    if search.algorithm != "cmaes":
        return None
    for key, domain in search.space.items():
        if domain.kind not in RANGES:
            return f"{SPACE}.{key}: cmaes draws numbers from ranges, and a {domain.kind} has none. Use tpe."
    if len(search.space) < 2:
        return "search.algorithm: cmaes needs two keys at least, as it learns how they depend on each other. Use tpe."
    return None
