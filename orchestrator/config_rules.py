"""Judges values that are each fine alone: names, ranges, and combinations of keys. Pure functions, no effects.

A rule looks at a whole configuration and returns what is wrong with it. A search must obey the rules at every point of
its space, so that no trial fails on a combination that could have been refused before the first one started.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from orchestrator.config_errors import SPACE, known_keys, show, unknown_key, value_problem

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config_search import Domain, Search
    from orchestrator.config_sections import Stage

_START, _END = "binarize.bin_start", "binarize.bin_end"
_MAX_NAME = 100
_NOT_SEARCHABLE = (
    "name", "data.train", "data.val", "data.cache_folder", "data.cache_gb", "data.retry_s", "data.decoded_cache_gb",
    "train.init_from", "train.checkpoint", "train.distill", "train.kurtosis",
    "train.stages", "binarize.plan", "cluster", "storage", "tracking", "search",
)  # fmt: skip
_WITH_WINDOW = ("clipped", "polynomial", "ede", None)  # null: what the model has, one of these
# Key, the values it must have, and the keys that are looked at only then.
_NEEDS = (
    ("optim.name", ("sgd",), ("optim.momentum", "optim.nesterov")),
    ("schedule.name", ("decay",), ("schedule.interval",)),
    ("schedule.name", ("decay", "step"), ("schedule.level",)),
    ("schedule.name", ("step",), ("schedule.milestones",)),
    ("binarize.ste", _WITH_WINDOW, ("binarize.ste_width", "binarize.ste_center")),
    ("binarize.input_ste", _WITH_WINDOW, ("binarize.input_ste_width",)),
)
STAGE_TEACHER = "stage:"
# The transforms of `dabnn.data.transforms.CROPPING`, which would import torch; a test compares them.
CROPPING = ("sketch", "sketch_no_flip", "imagenet")
# An integer axis up to this long is tried value by value, a longer one at its two ends.
_MAX_VALUES = 256


@dataclass(frozen=True)
class Rule:
    """A law over several keys.

    Attributes:
        keys: The keys that it reads, so that a search knows which of its axes it must combine.
        problem: Returns what is wrong with a configuration, or None.
    """

    keys: tuple[str, ...]
    problem: Callable[["Config"], str | None]


def check_name(name: str) -> str:
    """Return `name` when it can be the name of a run.

    It is shown in tables and stands in paths, and is never part of a shell line, so quotes and `$` are fine.

    Raises:
        ValueError: It is blank, too long, or holds a slash or a character that does not print.
    """
    if not name.strip() or name in {".", ".."}:
        raise ValueError("is no name")
    if len(name) > _MAX_NAME:
        raise ValueError(f"has {len(name)} characters; at most {_MAX_NAME} fit in a table")
    if "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("holds a slash, a line break or another character that does not print")
    return name


def check_different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `values` when none stands there twice.

    Raises:
        ValueError: One does.
    """
    if len(set(values)) < len(values):
        raise ValueError("names a layer twice")
    return values


def check_inputs(inputs: Any) -> Any:
    """Return `inputs` when it is a word or a list of different layers.

    Raises:
        ValueError: The list is empty or names a layer twice.
    """
    if inputs == ():
        raise ValueError("is empty; write none for no binary inputs")
    return check_different(inputs) if isinstance(inputs, tuple) else inputs


def check_milestones(milestones: tuple[float, ...]) -> tuple[float, ...]:
    """Return `milestones` when each comes after the one before.

    Raises:
        ValueError: One does not.
    """
    if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
        raise ValueError("must rise from each to the next")
    return milestones


def check_domain(domain: "Domain") -> "Domain":
    """Return `domain` when it holds at least one value.

    Raises:
        ValueError: A range is empty or reversed, a logarithmic one starts at 0 or below, a choice is empty or repeats.
    """
    values: tuple[Any, ...] = domain.values
    if domain.kind == "choice":
        if not values or len({show(value) for value in values}) < len(values):
            raise ValueError("must offer one value at least, and none of them twice")
        return domain
    low, high = values
    if low >= high:
        raise ValueError("must be [lowest, highest] with lowest below highest")
    if domain.kind == "log" and low <= 0:
        raise ValueError("must start above 0; a logarithm has no 0")
    return domain


def check_config(config: "Config") -> None:
    """Hold `config`, and every point of its search space, against all rules.

    Raises:
        ValueError: One line for each broken rule.
    """
    problems = [problem for rule in _RULES if (problem := rule.problem(config))]
    if config.search and not problems:
        problems += _search_problems(config, config.search)
    if problems:
        raise ValueError("\n".join(problems))


def check_written(config: "Config", parts: Sequence["Config"]) -> None:
    """Refuse values that nothing would ever look at, so that nothing a person writes is silently ignored.

    The trials of a search are not held to this: one with `cosine` carries the `interval` of its siblings with `decay`.

    Args:
        config: What was written.
        parts: What each stage of it runs, or `config` alone.

    Raises:
        ValueError: One line for each value without effect.
    """
    problems = [problem for check in (_unused_epochs, _unused_decay, _teacher_stage) if (problem := check(config))]
    for selector, wanted, keys in _NEEDS:
        chosen = _value(config, selector)
        if any(_value(part, selector) in wanted for part in parts) or _is_searched(config, selector):
            continue
        for key in keys:
            if _is_searched(config, key) or _value(config, key) != _leaves(config)[key].default:
                problems.append(_no_effect(key, selector, chosen, wanted))
    for position, (stage, part) in enumerate(zip(config.train.stages or (), parts, strict=bool(config.train.stages))):
        problems += [f"train.stages[{position}].{problem}" for problem in _unused_in_stage(stage, part)]
    if problems:
        raise ValueError("\n".join(problems))


def _no_effect(key: str, selector: str, chosen: Any, wanted: Sequence[str | None]) -> str:
    return f"{key}: has no effect with {selector}={chosen}. Remove it, or use {' or '.join(filter(None, wanted))}."


def _unused_in_stage(stage: "Stage", part: "Config") -> Iterator[str]:
    for selector, wanted, keys in _NEEDS:
        chosen = _value(part, selector)
        for section, _, leaf in (key.partition(".") for key in keys if chosen not in wanted):
            written = getattr(stage, section)
            if written is not None and leaf in written.model_fields_set:
                yield _no_effect(f"{section}.{leaf}", selector, chosen, wanted)


def _unused_epochs(config: "Config") -> str | None:
    stages, epochs = config.train.stages, config.train.epochs
    total = sum(stage.epochs for stage in stages or ())
    if stages is None or epochs in (total, _leaves(config)["train.epochs"].default):
        return None
    return f"train.epochs: {epochs}, but the stages take {total} epochs together. Leave it out."


def _unused_decay(config: "Config") -> str | None:
    decays = [config.optim, *(stage.optim for stage in config.train.stages or () if stage.optim is not None)]
    if not config.optim.decay_all or any(optim.weight_decay for optim in decays):
        return None
    if _is_searched(config, "optim.weight_decay"):
        return None
    return "optim.decay_all: has no effect with optim.weight_decay=0. Remove it, or set the weight decay."


def _teacher_stage(config: "Config") -> str | None:
    teacher = config.train.distill.teacher if config.train.distill else ""
    if config.train.stages is not None or not teacher.startswith(STAGE_TEACHER):
        return None
    return (
        f"train.distill.teacher: {teacher} names a stage, and the run has none. Add train.stages, or name a run or a "
        "checkpoint file."
    )


def _bin_range_is_empty(start: int | None, end: int | None) -> bool:
    return start is not None and end is not None and start > end


def _bin_range(config: "Config") -> str | None:
    start, end = config.binarize.bin_start, config.binarize.bin_end
    if not _bin_range_is_empty(start, end):
        return None
    return (
        f"binarize.bin_end: {end} comes before binarize.bin_start={start}, which leaves no layer to binarize. "
        f"Give at least {start}, or take the float model of the family."
    )


def _batch_size(config: "Config") -> str | None:
    size, workers = config.data.batch_size, config.cluster.num_workers
    below = size // workers * workers
    if size % workers:
        return (
            f"data.batch_size: {size} is not a multiple of cluster.num_workers={workers}; each worker takes an equal "
            "share, so that the samples of a step do not depend on the number of workers. "
            f"Use {max(below, 2 * workers)} or {max(below, 2 * workers) + workers}."
        )
    if size < 2 * workers:
        return (
            f"data.batch_size: {size} over {workers} workers is one sample each; BatchNorm needs two to have a "
            f"variance. Use at least {2 * workers}."
        )
    return None


def _ten_crop(config: "Config") -> str | None:
    transform = config.data.transform
    if not config.data.ten_crop or transform in CROPPING:
        return None
    return (
        f"data.ten_crop: true, but data.transform={transform} resizes images to the very size of the input, which "
        f"leaves nothing to crop. Use one of {', '.join(CROPPING)}, or turn it off."
    )


def _statistics(config: "Config") -> str | None:
    mean, std = config.data.mean, config.data.std
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        return f"data.{'mean' if mean is None else 'std'}: is null and the other is not. Give both, or neither."
    channels = config.model.in_channels or len(mean)
    if (len(mean), len(std)) != (channels, channels):
        return f"data.mean, data.std: {len(mean)} and {len(std)} values for {channels} channels. Give one a channel."
    return None


def _rate_limits(config: "Config") -> str | None:
    low, high = config.optim.min_lr, config.optim.max_lr
    if low <= high:
        return None
    return f"optim.min_lr: {low} is above optim.max_lr={high}; the schedule goes down from one to the other. Lower it."


def _nesterov(config: "Config") -> str | None:
    if config.optim.nesterov and config.optim.momentum == 0:
        return "optim.nesterov: true needs momentum, and optim.momentum is 0. Raise one or turn off the other."
    return None


def _warmup(config: "Config") -> str | None:
    limits = {"train.epochs": config.train.epochs}
    if config.search and config.search.epochs:
        limits["search.epochs"] = config.search.epochs
    for key, epochs in limits.items():
        if config.schedule.warmup_epochs >= epochs:
            return f"schedule.warmup_epochs: {config.schedule.warmup_epochs} is all of {key}={epochs}. Use fewer."
    return None


def _gpu_share(config: "Config") -> str | None:
    gpus, workers = config.cluster.gpus_per_worker, config.cluster.num_workers
    if gpus > 1 and gpus != int(gpus):
        return f"cluster.gpus_per_worker: {gpus} is neither a whole number nor a part of one GPU. Use {int(gpus)}."
    if gpus != int(gpus) and workers > 1:
        return (
            f"cluster.gpus_per_worker: {gpus} with {workers} workers would put two ranks on one GPU, where NCCL hangs. "
            "Use 1, or cluster.num_workers=1."
        )
    return None


def _layer_choice(config: "Config") -> str | None:
    binarize = config.binarize
    given = {
        "bin_start": binarize.bin_start, "bin_end": binarize.bin_end, "layers": binarize.layers, "plan": binarize.plan
    }  # fmt: skip
    keys = [f"binarize.{key}" for key, value in given.items() if value is not None]
    if len(keys) > 1 and keys != [_START, _END]:
        return f"{keys[-1]}: {' and '.join(keys[:-1])} already chose the layers with binary weights. Keep one of them."
    if binarize.plan is not None and binarize.inputs != "model":
        return "binarize.inputs: binarize.plan already names the layers with binary inputs. Keep one of them."
    return None


def _milestones(config: "Config") -> str | None:
    if config.schedule.name != "step":
        return None
    milestones, epochs = config.schedule.milestones, config.train.epochs
    if not milestones:
        return "schedule.milestones: missing; step lowers the rate at these epochs. Give a list such as [30, 60]."
    if config.train.stages is None and milestones[-1] >= epochs:
        return f"schedule.milestones: {milestones[-1]:g} is not below train.epochs={epochs}. Remove it."
    return None


def _stages(config: "Config") -> str | None:
    earlier: list[str] = []
    for position, stage in enumerate(config.train.stages or ()):
        if stage.name in earlier:
            return f"train.stages[{position}].name: {stage.name!r} stands there twice. Give each stage its own name."
        distill = stage.distill if "distill" in stage.model_fields_set else config.train.distill
        named = distill.teacher.removeprefix(STAGE_TEACHER) if distill else ""
        if distill and distill.teacher.startswith(STAGE_TEACHER) and named not in earlier:
            known = ", ".join(earlier) or "none: this is the first"
            return (
                f"train.stages[{position}].distill.teacher: {distill.teacher} is no earlier stage ({known}). Name one "
                "of those, a run, or a checkpoint file; or write distill: null for this stage."
            )
        earlier.append(stage.name)
    return None


_RULES = (
    Rule((_START, _END), _bin_range),
    Rule((_START, _END), _layer_choice),
    Rule(("schedule.name", "train.epochs"), _milestones),
    Rule((), _stages),
    Rule(("data.batch_size",), _batch_size),
    Rule(("data.transform", "data.ten_crop"), _ten_crop),
    Rule((), _statistics),
    Rule(("optim.min_lr", "optim.max_lr"), _rate_limits),
    Rule(("optim.momentum", "optim.nesterov"), _nesterov),
    Rule(("train.epochs", "schedule.warmup_epochs"), _warmup),
    Rule((), _gpu_share),
)


def _is_searched(config: "Config", key: str) -> bool:
    return config.search is not None and key in config.search.space


def _search_problems(config: "Config", search: "Search") -> list[str]:
    problems = [problem for key, domain in search.space.items() if (problem := _axis_problem(config, key, domain))]
    if not problems:
        problems = [problem for rule in _RULES if (problem := _space_problem(config, search, rule))]
    problems += [problem for check in (_objective, _grid) if (problem := check(search))]
    problems += _stages_in_search(config, search)
    return problems


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
    for key in search.space:
        section, _, leaf = key.partition(".")
        sections = [getattr(stage, section, None) for stage in config.train.stages]
        if key == "train.epochs" or all(
            written is not None and leaf in written.model_fields_set for written in sections
        ):
            yield f"{SPACE}.{key}: each stage in train.stages sets its own, so trials would not differ. Remove it."


def _axis_problem(config: "Config", key: str, domain: "Domain") -> str | None:
    searchable = {leaf: field for leaf, field in _leaves(config).items() if not _is_fixed(leaf)}
    if key not in _leaves(config):
        return f"{SPACE}.{unknown_key(key, searchable)}"
    if key not in searchable:
        return f"{SPACE}.{key}: cannot differ between the trials of a search. Set {key} itself."
    if key == "train.epochs" and config.search and config.search.epochs:
        return (
            f"{SPACE}.{key}: search.epochs={config.search.epochs} already sets it for each trial. Remove one of them."
        )
    field = searchable[key]
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    for value in domain.values:
        try:
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            return value_problem(f"{SPACE}.{key}", error.errors()[0], field)
    return None


def _leaves(config: "Config") -> dict[str, FieldInfo]:
    keys = known_keys(type(config))
    sections = {key.rpartition(".")[0] for key in keys}
    return {key: field for key, field in keys.items() if key not in sections}


def _value(config: "Config", key: str) -> Any:
    section, _, leaf = key.rpartition(".")
    return getattr(getattr(config, section), leaf)


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in _NOT_SEARCHABLE)


def _space_problem(config: "Config", search: "Search", rule: Rule) -> str | None:
    axes = [key for key in rule.keys if key in search.space]
    for point in _points(search, axes) if axes else ():
        if problem := rule.problem(_with_values(config, point)):
            chosen = ", ".join(f"{key}={show(value)}" for key, value in point.items())
            return f"{SPACE}: a trial could get {chosen}. {problem} Or narrow the space."
    return None


def _points(search: "Search", axes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the points that a search can reach on `axes`, as far as they decide whether a rule holds."""
    samples = {key: _samples(search.space[key]) for key in axes}
    draws_end = {_START, _END} <= set(axes) and (search.algorithm == "grid" or search.space[_END].kind == "int")
    for values in itertools.product(*samples.values()):
        point = dict(zip(axes, values, strict=True))
        # The searcher draws the end from what the start leaves, so only a start that leaves nothing is wrong.
        if draws_end and _bin_range_is_empty(point[_START], point[_END]) and point[_START] <= max(samples[_END]):
            continue
        yield point


def _num_points(domain: "Domain") -> int:
    return domain.int_[1] - domain.int_[0] + 1 if domain.int_ else len(domain.values)


def _samples(domain: "Domain") -> tuple[Any, ...]:
    if domain.int_ is None:
        return domain.values
    low, high = domain.int_
    return tuple(range(low, high + 1)) if high - low < _MAX_VALUES else domain.int_


def _with_values(config: "Config", values: Mapping[str, Any]) -> "Config":
    """Return an unvalidated copy of `config` with leaves of its sections replaced."""
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={leaf: value})})
    return config


def _objective(search: "Search") -> str | None:
    if len(search.objectives) > 1:
        return f"search.objectives: {len(search.objectives)} objectives; this version improves one. Keep the first."
    objective = search.objectives[0]
    wanted = "min" if objective.metric == "val_loss" else "max"
    if objective.mode == wanted:
        return None
    return f"search.objectives: mode {objective.mode} would look for the worst {objective.metric}. Use mode: {wanted}."


def _grid(search: "Search") -> str | None:
    if search.algorithm != "grid":
        return None
    for key, domain in search.space.items():
        if domain.kind not in {"int", "choice"}:
            return f"{SPACE}.{key}: {domain.kind} has no end of values, and a grid visits each. Use choice, or tpe."
    pair = [key for key in (_START, _END) if key in search.space]
    others = (_num_points(domain) for key, domain in search.space.items() if key not in pair)
    size = math.prod(others) * sum(1 for _ in _points(search, pair))
    if size <= search.num_trials:
        return None
    return f"search.num_trials: {search.num_trials} is less than the {size} points of the grid. Raise it."
