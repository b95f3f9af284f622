"""Judges values that are each fine alone: names, ranges, and combinations of keys. Pure functions, no effects.

A rule looks at a whole configuration, or at what one stage of it runs, and returns what is wrong with it. The points of
a search space are held against the rules in `orchestrator.config_space`.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.config_errors import leaf_keys, show
from orchestrator.config_needs import NEEDS
from orchestrator.config_space import END, START, bin_range_is_empty, space_problems
from orchestrator.names import nearest

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config_search import Domain
    from orchestrator.config_sections import Stage

_MAX_NAME = 100
_MAX_INTERFACE = 15  # IFNAMSIZ of Linux, less the closing zero
PLAN_KEYS = ("weights", "inputs")
STAGE_TEACHER = "stage:"
# The transforms of `dabnn.data.transforms.CROPPING`, which would import torch; a test compares them.
CROPPING = ("sketch", "sketch_no_flip", "imagenet")


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


def check_selectors(value: Any) -> Any:
    """Return `value` unless it is a list with an entry that can name no layer.

    Raises:
        ValueError: One does; names the first.
    """
    for entry in value if isinstance(value, list | tuple) else ():
        if isinstance(entry, bool) or not isinstance(entry, int | str) or entry == "":
            raise ValueError(
                f"holds {show(entry)}, which names no layer; write numbers, paths or regular expressions, such as "
                "[2, 'stage3.*']"
            )
        if isinstance(entry, int) and entry < 1:
            raise ValueError(f"holds {entry}, and layer numbers start at 1")
    return value


def check_plan(value: Any) -> Any:
    """Return `value` unless it is an empty name of a file, or a mapping that is no plan.

    Raises:
        ValueError: It is; names the key.
    """
    if value == "":
        raise ValueError("names no file")
    for key, selectors in value.items() if isinstance(value, dict) else ():
        if key not in PLAN_KEYS:
            raise ValueError(f"has the unknown key {key}; did you mean {nearest(str(key), PLAN_KEYS)}?")
        try:
            check_selectors(selectors)
        except ValueError as error:
            raise ValueError(f"under {key} {error}") from None
    return value


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


def check_interface(name: str) -> str:
    """Return `name` when Linux would take it as the name of a network interface.

    Raises:
        ValueError: It is empty, too long, or holds a character that such names do not have.
    """
    if (
        not 0 < len(name) <= _MAX_INTERFACE
        or "/" in name
        or any(char.isspace() or not char.isprintable() for char in name)
    ):
        raise ValueError(f"is no name of a network interface (1 to {_MAX_INTERFACE} characters without spaces)")
    return name


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
    if domain.kind in ("choice", "subset"):
        if not values or len({json.dumps(value) for value in values}) < len(values):
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
        problems += space_problems(config, config.search, _RULES)
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
    problems = [problem for check in (_unused_epochs, _teacher_stage) if (problem := check(config))]
    problems += unused(config, parts).values()
    for position, (stage, part) in enumerate(zip(config.train.stages or (), parts, strict=bool(config.train.stages))):
        problems += [f"train.stages[{position}].{problem}" for problem in _unused_in_stage(stage, part)]
    if problems:
        raise ValueError("\n".join(problems))


def unused(config: "Config", parts: Sequence["Config"]) -> dict[str, str]:
    """Return key -> problem for each value of the run's own, other than the default, that no part of it looks at."""
    problems = {}
    for need in NEEDS:
        if any(need.is_met(_value(part, need.selector)) for part in parts) or _is_searched(config, need.selector):
            continue
        for key in need.keys:
            if _is_searched(config, key) or _value(config, key) != leaf_keys(type(config))[key].default:
                problems[key] = need.problem(key, _value(config, need.selector))
    is_decayed = any(part.optim.weight_decay for part in parts) or _is_searched(config, "optim.weight_decay")
    if config.optim.decay_all and not is_decayed:
        problems["optim.decay_all"] = (
            "optim.decay_all: has no effect with optim.weight_decay=0. Remove it, or set the weight decay."
        )
    return problems


def _unused_in_stage(stage: "Stage", part: "Config") -> Iterator[str]:
    for need in NEEDS:
        chosen = _value(part, need.selector)
        for key in need.keys if not need.is_met(chosen) else ():
            section, _, leaf = key.partition(".")
            written = getattr(stage, section)
            if written is not None and leaf in written.model_fields_set:
                yield need.problem(key, chosen)


def _unused_epochs(config: "Config") -> str | None:
    stages, epochs = config.train.stages, config.train.epochs
    total = sum(stage.epochs for stage in stages or ())
    if stages is None or epochs in (total, leaf_keys(type(config))["train.epochs"].default):
        return None
    return f"train.epochs: {epochs}, but the stages take {total} epochs together. Leave it out."


def _teacher_stage(config: "Config") -> str | None:
    teacher = config.train.distill.teacher if config.train.distill else ""
    if config.train.stages is not None or not teacher.startswith(STAGE_TEACHER):
        return None
    return (
        f"train.distill.teacher: {teacher} names a stage, and the run has none. Add train.stages, or name a run or a "
        "checkpoint file."
    )


def _bin_range(config: "Config") -> str | None:
    start, end = config.binarize.bin_start, config.binarize.bin_end
    if not bin_range_is_empty(start, end):
        return None
    return (
        f"binarize.bin_end: {end} comes before binarize.bin_start={start}, which leaves no layer to binarize. Raise "
        "it, lower binarize.bin_start, or take the float model of the family; "
        f"`dab models show {config.model.name}` numbers the layers."
    )


def _batch_size(config: "Config") -> str | None:
    size, workers = config.data.batch_size, config.cluster.num_processes
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


def _epochs(config: "Config") -> dict[str, int]:
    """Return how long the run and its trials are, by the key that says so."""
    trials = {"search.epochs": config.search.epochs} if config.search and config.search.epochs else {}
    return {"train.epochs": config.train.epochs} | trials


def _warmup(config: "Config") -> str | None:
    for key, epochs in _epochs(config).items():
        if config.schedule.warmup_epochs >= epochs:
            return f"schedule.warmup_epochs: {config.schedule.warmup_epochs} is all of {key}={epochs}. Use fewer."
    return None


def _gpu_share(config: "Config") -> str | None:
    gpus, workers = config.cluster.gpus_per_worker, config.cluster.num_workers
    if gpus > 1 and gpus != int(gpus):
        return f"cluster.gpus_per_worker: {gpus} is neither a whole number nor a part of one GPU. Use {int(gpus)}."
    if gpus != int(gpus) and workers > 1:
        return (
            f"cluster.gpus_per_worker: {gpus} with {workers} workers would put two ranks on one GPU, which NCCL "
            "refuses. Use 1, or cluster.num_workers=1."
        )
    return None


def _no_workers(config: "Config") -> str | None:
    gpus = config.cluster.gpus_per_worker
    if config.cluster.num_workers or not gpus:
        return None
    return (
        f"cluster.num_workers: 0 trains in the job's own process, which Ray gives no GPU, and cluster.gpus_per_worker "
        f"asks for {gpus:g}. Use cluster.num_workers=1."
    )


def _min_workers(config: "Config") -> str | None:
    fewest, workers = config.cluster.min_workers, config.cluster.num_workers
    if fewest is None or fewest <= workers:
        return None
    return (
        f"cluster.min_workers: {fewest} is more than cluster.num_workers={workers}, which the run starts with. Lower "
        "it, or raise cluster.num_workers."
    )


def _layer_choice(config: "Config") -> str | None:
    binarize = config.binarize
    given = {
        "bin_start": binarize.bin_start, "bin_end": binarize.bin_end, "layers": binarize.layers, "plan": binarize.plan
    }  # fmt: skip
    keys = [f"binarize.{key}" for key, value in given.items() if value is not None]
    if len(keys) > 1 and keys != [START, END]:
        return f"{keys[-1]}: {' and '.join(keys[:-1])} already chose the layers with binary weights. Keep one of them."
    return None


def _plan_inputs(config: "Config") -> str | None:
    if config.binarize.plan is not None and config.binarize.inputs != "model":
        return "binarize.inputs: binarize.plan already names the layers with binary inputs. Keep one of them."
    return None


def _milestones(config: "Config") -> str | None:
    if config.schedule.name != "step":
        return None
    milestones = config.schedule.milestones
    if not milestones:
        return "schedule.milestones: missing; step lowers the rate at these epochs. Give a list such as [30, 60]."
    for key, epochs in _epochs(config).items() if config.train.stages is None else ():
        if milestones[-1] >= epochs:
            return f"schedule.milestones: {milestones[-1]:g} is not below {key}={epochs}. Remove it."
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
    Rule((START, END), _bin_range),
    Rule((START, END, "binarize.layers", "binarize.plan"), _layer_choice),
    Rule(("binarize.inputs", "binarize.plan"), _plan_inputs),
    Rule(("schedule.name", "schedule.milestones", "train.epochs"), _milestones),
    Rule((), _stages),
    Rule(("data.batch_size",), _batch_size),
    Rule(("data.transform", "data.ten_crop"), _ten_crop),
    Rule(("model.in_channels",), _statistics),
    Rule(("optim.min_lr", "optim.max_lr"), _rate_limits),
    Rule(("optim.momentum", "optim.nesterov"), _nesterov),
    Rule(("train.epochs", "schedule.warmup_epochs"), _warmup),
    Rule((), _gpu_share),
    Rule((), _no_workers),
    Rule((), _min_workers),
)


def _is_searched(config: "Config", key: str) -> bool:
    return config.search is not None and key in config.search.space


def _value(config: "Config", key: str) -> Any:
    section, _, leaf = key.rpartition(".")
    return getattr(getattr(config, section), leaf)
