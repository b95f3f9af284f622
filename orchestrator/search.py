"""From the `search` section of a configuration to what Ray Tune runs.

That is: what a trial's configuration is, what is known of its network, and who stops trials early. Points are proposed
and remembered by `orchestrator.study`.
"""

import functools
from dataclasses import dataclass
from typing import Any

from dabnn.checkpoints import load_state
from dabnn.errors import InvalidInputError
from orchestrator.config import Config, with_overrides
from orchestrator.config_search import OF_NETWORK, Domain, Search
from orchestrator.config_space import point_problem, sampled_points
from orchestrator.points import draw, grid
from orchestrator.resolve import check_networks, model_table

# Networks built before a sweep starts, without their memory: some 30 ms each.
MAX_POINTS = 64
# Binary networks improve late, as signs flip until the rate falls: none is judged earlier, nor in its first quarter.
MIN_EPOCHS_BEFORE_STOP = 3
_MEDIAN_OF = 3  # trials that must have got as far before one is compared with their median


@dataclass(frozen=True)
class DrawPoint:
    """Draws one point of a space from an Optuna trial (define-by-run); Tune pickles it, so it is no closure.

    Attributes:
        space: Dotted configuration key -> what it may be.
    """

    space: dict[str, Domain]

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Draw the point."""
        return draw(trial, self.space)


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


def make_searcher(search: Search, seed: int) -> tuple[Any, dict[str, Any], int]:
    """Return (search algorithm or None, Tune parameter space, number of samples).

    A point of a grid arrives in the trial under the key "point"; the others arrive as they are.
    """
    if search.algorithm == "grid":
        from ray import tune

        points = list(grid(search.space))[: search.num_trials]
        return None, {"point": tune.grid_search(points)}, 1
    from ray.tune.search.optuna import OptunaSearch

    from orchestrator.study import make_sampler

    objective = search.objectives[0]
    searcher = OptunaSearch(
        space=DrawPoint(search.space),
        metric=objective.metric,
        mode=objective.mode,
        sampler=make_sampler(search, seed),
    )
    return searcher, {}, search.num_trials


def make_scheduler(search: Search, epochs: int) -> Any:
    """Return Tune's scheduler over finished epochs; None when trials are not stopped early or are too short to judge.

    It judges by the first objective that is logged each epoch.
    """
    grace = search.grace_epochs or max(MIN_EPOCHS_BEFORE_STOP, epochs // 4)
    judged = [objective for objective in search.objectives if objective.metric not in OF_NETWORK]
    if search.early_stop is None or grace >= epochs or not judged:
        return None
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    by: Any = {"time_attr": "epoch", "metric": judged[0].metric, "mode": judged[0].mode, "grace_period": grace}
    if search.early_stop == "median":
        return MedianStoppingRule(**by, min_samples_required=_MEDIAN_OF)
    # A trial that gets to its last epoch ends itself, with its result and checkpoint.
    return ASHAScheduler(**by, max_t=epochs + 1, reduction_factor=search.reduction)
