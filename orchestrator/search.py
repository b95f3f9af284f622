"""From the `search` section of a configuration to what Ray Tune runs.

That is: who proposes points, who stops trials early, and what a point is.

`bin_end >= bin_start` holds by construction: the end is drawn from the values that the start leaves.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, TypeVar

from dabnn.checkpoints import load_state
from dabnn.errors import InvalidInputError
from orchestrator.config import Config, with_overrides
from orchestrator.config_search import Domain, Search
from orchestrator.config_space import END, START, point_problem, sampled_points
from orchestrator.resolve import check_networks

_Number = TypeVar("_Number", int, float)

# Networks built before a sweep starts, without their memory: some 30 ms each.
MAX_POINTS = 64
MIN_EPOCHS_BEFORE_STOP = 3  # binary networks improve late: no trial is judged earlier, nor in its first quarter


@dataclass(frozen=True)
class DrawPoint:
    """Draws one point of a space from an Optuna trial (define-by-run); Tune pickles it, so it is no closure.

    Attributes:
        space: Dotted configuration key -> what it may be.
    """

    space: dict[str, Domain]

    def __call__(self, trial: Any) -> None:
        """Draw the point; Optuna's trial remembers it."""
        start = self._draw(trial, START, None) if START in self.space else None
        for key in self.space:
            if key != START:
                self._draw(trial, key, start if key == END else None)

    def _draw(self, trial: Any, key: str, least: int | None) -> Any:
        domain = self.space[key]
        if domain.kind == "choice":
            return trial.suggest_categorical(key, list(domain.values))
        if domain.kind == "int":
            low, high = _ends(domain, int)
            low = low if least is None else max(low, least)
            return trial.suggest_int(key, low, max(low, high))
        return trial.suggest_float(key, *_ends(domain, float), log=domain.kind == "log")


def grid_points(space: dict[str, Domain]) -> list[dict[str, Any]]:
    """Return every point of a space of choices and integers with `bin_end >= bin_start`, in the order of the keys.

    Raises:
        InvalidInputError: A domain is continuous.
    """
    axes: list[list[Any]] = []
    for key, domain in space.items():
        if domain.kind not in ("int", "choice"):
            raise InvalidInputError(
                f"search.space.{key}: a grid has no points for a {domain.kind} range. List them: {{choice: [...]}}."
            )
        if domain.kind == "int":
            low, high = _ends(domain, int)
            axes.append(list(range(low, high + 1)))
        else:
            axes.append(list(domain.values))
    points: list[dict[str, Any]] = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    return [point for point in points if point.get(START) is None or point.get(END, point[START]) >= point[START]]


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


def make_searcher(search: Search, seed: int) -> tuple[Any, dict[str, Any], int]:
    """Return (search algorithm or None, Tune parameter space, number of samples).

    A point of a grid arrives in the trial under the key "point"; the others arrive as they are.
    """
    if search.algorithm == "grid":
        from ray import tune

        points = grid_points(search.space)[: search.num_trials]
        return None, {"point": tune.grid_search(points)}, 1
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if search.algorithm == "tpe":
        sampler: Any = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, min(10, search.num_trials // 3)))
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    objective = search.objectives[0]
    searcher = OptunaSearch(
        space=DrawPoint(search.space), metric=objective.metric, mode=objective.mode, sampler=sampler
    )
    return searcher, {}, search.num_trials


def make_scheduler(search: Search, epochs: int) -> Any:
    """Return Tune's ASHA over finished epochs, or None when trials are not stopped early or are too short to judge."""
    grace = max(MIN_EPOCHS_BEFORE_STOP, epochs // 4)
    if search.early_stop is None or grace >= epochs:
        return None
    from ray.tune.schedulers import ASHAScheduler

    objective = search.objectives[0]
    return ASHAScheduler(
        time_attr="epoch",
        metric=objective.metric,
        mode=objective.mode,
        max_t=epochs + 1,  # a trial that gets to its last epoch ends itself, with its result and checkpoint
        grace_period=grace,
        reduction_factor=2,
    )


def _ends(domain: Domain, kind: type[_Number]) -> tuple[_Number, _Number]:
    low, high = domain.values
    return kind(low), kind(high)  # type: ignore[arg-type] # a range holds two numbers; the configuration checked it
