"""From the `search` section of a configuration to its trials.

That is: what each one's configuration is, what is known of its network, and when it may be ended early. Points are
proposed and remembered by `orchestrator.study`.
"""

import functools
from typing import Any

from dabnn.checkpoints import load_state
from dabnn.errors import InvalidInputError
from orchestrator.config import Config, with_overrides
from orchestrator.config_search import OF_NETWORK, Search
from orchestrator.config_space import point_problem, sampled_points
from orchestrator.resolve import check_networks, model_table

# Networks built before a sweep starts, without their memory: some 30 ms each.
MAX_POINTS = 64
# Binary networks improve late, as signs flip until the rate falls: none is judged earlier, nor in its first quarter.
MIN_EPOCHS_BEFORE_STOP = 3


def check_trials(config: Config) -> None:
    """Refuse a search with points whose networks cannot be built; many points are tried in part, ends first.

    Args:
        config: Resolved, with a search.

    Raises:
        InvalidInputError: Names the point and what is wrong with it.
    """
    if config.search is None:
        return
    axes = [key for key in config.search.space if key.startswith(("model.", "binarize."))]
    load = functools.cache(load_state)
    for point in sampled_points(config.search, axes, MAX_POINTS) if axes else ():
        try:
            check_networks(with_overrides(trial_config(config), point), load=load)
        except InvalidInputError as error:
            raise InvalidInputError(point_problem(point, str(error))) from None


def trial_config(config: Config) -> Config:
    """Return the configuration of a trial before its point is applied: no search, its own number of epochs."""
    epochs = (config.search and config.search.epochs) or config.train.epochs
    return config.model_copy(update={"search": None, "train": config.train.model_copy(update={"epochs": epochs})})


def network_metrics(config: Config, values: dict[str, Any]) -> dict[str, float]:
    """Return packed_bytes and bit_ops (of one image) of the network of a point, which need no training.

    One that cannot be built has none: its trial will say why.

    Args:
        config: Of the sweep, resolved.
        values: The point.
    """
    try:
        table = model_table(with_overrides(trial_config(config), values))
    except InvalidInputError:
        return {}
    return {
        "packed_bytes": float(table.packed_bytes),
        "bit_ops": float(sum(layer.bit_ops for layer in table.layers)),
    }


def judged_metric(search: Search) -> tuple[str, str] | None:
    """Return (metric, mode) of the first objective that is logged each epoch, by which trials are ended early."""
    for objective in search.objectives:
        if objective.metric not in OF_NETWORK:
            return objective.metric, objective.mode
    return None


def grace_epochs(search: Search, epochs: int) -> int:
    """Return the epochs before a trial of `epochs` epochs can be ended early."""
    return search.grace_epochs or max(MIN_EPOCHS_BEFORE_STOP, epochs // 4)


def wants_latency(search: Search) -> bool:
    """Whether the latency of each trial's network has to be measured."""
    names = [objective.metric for objective in search.objectives] + [limit.metric for limit in search.limits]
    return "latency_ms" in names
