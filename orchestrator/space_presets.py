"""Ready search spaces: what `search.preset` stands for, as a function of the model, the optimizer and the epochs."""

from collections.abc import Mapping
from typing import Any

from orchestrator.config_space import END, START

PRESETS = ("reference", "quick")
_QUICK_TRIALS = 8
# Of the optimizers with the default rate of torch or the reference program well inside.
_RATES = {"sgd": (5e-3, 0.5), "adagrad": (1e-3, 0.1), "adadelta": (0.1, 10.0)}
_RATES_OF_ADAM = (1e-4, 1e-2)
# Milestones of `step` as shares of the epochs: once, and twice, early and late.
_MILESTONES = ((0.5,), (0.75,), (1 / 3, 2 / 3), (0.5, 0.75), (0.6, 0.85))
_FEWEST_LAYERS = 4  # of a network with a range to choose: the first and the last layer stay real


def expanded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, as read, in which `search.preset` is replaced by the space it stands for.

    Entries of `search.space` replace those of the preset; null removes one. What is no configuration stays as it is,
    for the validation to refuse.

    Raises:
        InvalidInputError: There is no such model.
    """
    search, model = raw.get("search"), _at(raw, "model.name", None)
    if not isinstance(search, Mapping) or search.get("preset") not in PRESETS or not isinstance(model, str):
        return dict(raw)
    own = search.get("space") or {}
    if not isinstance(own, Mapping):
        return dict(raw)
    defaults: dict[str, Any] = {}
    space = _range(raw, model) | _rate(raw)
    if search["preset"] == "quick":
        epochs = _at(raw, "train.epochs", 100)
        shorter = {} if _at(raw, "train.stages", None) else {"epochs": min(epochs, max(3, epochs // 4))}
        defaults = {"num_trials": _QUICK_TRIALS} | shorter
    else:
        space |= _schedules(_at(raw, "search.epochs", None) or _at(raw, "train.epochs", 100))
    space = {key: domain for key, domain in (space | dict(own)).items() if domain is not None}
    return {**raw, "search": {**defaults, **search, "space": space, "preset": None}}


def _range(raw: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the range of binary layers, from 2 to the last but one as in the reference program (arXiv 1804.02941)."""
    from dabnn.models import outline

    chosen = [_at(raw, f"binarize.{key}", None) for key in ("layers", "plan")]
    own = _at(raw, "search.space", None) or {}
    num_layers = len(outline(model, num_classes=2).layers)
    if any(value is not None for value in chosen) or num_layers < _FEWEST_LAYERS:
        return {}
    if {"binarize.layers", "binarize.plan"} & set(own):
        return {}
    return {key: {"int": [2, num_layers - 1]} for key in (START, END)}


def _rate(raw: Mapping[str, Any]) -> dict[str, Any]:
    low, high = _RATES.get(_at(raw, "optim.name", "adam"), _RATES_OF_ADAM)
    least = _at(raw, "optim.min_lr", 0.0)
    return {"optim.max_lr": {"log": [max(low, least), high]}}


def _schedules(epochs: int) -> dict[str, Any]:
    """Return every schedule with its own keys, times from the number of epochs."""
    rounded = [[round(share * epochs) for share in shares] for shares in _MILESTONES]
    milestones = [each for each in rounded if each[0] > 0 and each[-1] < epochs and len(set(each)) == len(each)]
    milestones = [each for place, each in enumerate(milestones) if each not in milestones[:place]]
    names = ["decay", *(["step"] if milestones else []), "cosine", "linear", "one_cycle", "constant"]
    shortest, longest = max(1, epochs // 10), max(2, epochs // 2)
    space: dict[str, Any] = {"schedule.name": {"choice": names}, "schedule.level": {"log": [1.5, 10.0]}}
    if shortest < longest:
        space["schedule.interval"] = {"int": [shortest, longest]}
    return space | ({"schedule.milestones": {"choice": milestones}} if milestones else {})


def _at(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value at a dotted key, or the default where there is none or one of another type."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    is_other = isinstance(value, bool) or (default is not None and not isinstance(value, int | float | str))
    is_other = is_other or (isinstance(default, int | float) and isinstance(value, str))
    return default if value is None or is_other else value
