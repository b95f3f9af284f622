"""Judges what a search is after: objectives, constraints, early stopping, budget. Pure functions, no effects."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.names import nearest

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config_search import Search

_LAYER = "/"  # in the name of a metric of one layer


def goal_problems(config: "Config", search: "Search") -> list[str]:
    """Return what is wrong with an empty space, objectives, constraints, early stopping and budget of a search."""
    return [
        *_space(search),
        *_objectives(search),
        *_constraints(search),
        *_early_stop(search),
        *_budget(config, search),
    ]


def _space(search: "Search") -> Iterator[str]:
    if not search.space:
        yield (
            "search.space: missing; there is nothing to try. Name keys and what they may be, or take a ready space: "
            "search.preset=quick or search.preset=reference."
        )


def _objectives(search: "Search") -> Iterator[str]:
    from orchestrator.config_search import BETTER  # that module imports the rules, and they import this one

    metrics = [objective.metric for objective in search.objectives]
    for place, objective in enumerate(search.objectives):
        where, metric = f"search.objectives[{place}]", objective.metric
        yield from _unknown(f"{where}.metric", metric)
        wanted = BETTER.get(metric, objective.mode)
        if objective.mode != wanted:
            yield f"{where}: mode {objective.mode} would look for the worst {metric}. Use mode: {wanted}."
        if "mode" not in objective.model_fields_set and metric not in BETTER and _LAYER in metric:
            yield f"{where}.mode: missing; nothing says whether more or less of {metric} is better. Write max or min."
        if metric in metrics[:place]:
            yield f"{where}.metric: {metric} stands there twice. Remove one."
    if len(metrics) > 1 and search.algorithm == "cmaes":
        yield f"search.algorithm: cmaes improves one objective, and there are {len(metrics)}. Use nsga2, tpe or gp."


def _constraints(search: "Search") -> Iterator[str]:
    for place, limit in enumerate(search.limits):
        yield from _unknown(f"search.constraints[{place}]", limit.metric)


def _unknown(where: str, metric: str) -> Iterator[str]:
    from orchestrator.config_search import BETTER

    if metric not in BETTER and _LAYER not in metric:
        yield (
            f"{where}: no trial logs {metric}; did you mean {nearest(metric, BETTER)}? There are {', '.join(BETTER)}, "
            "and the measures of single layers as LAYER/NAME."
        )


def _early_stop(search: "Search") -> Iterator[str]:
    from orchestrator.config_search import OF_NETWORK

    if search.early_stop and all(objective.metric in OF_NETWORK for objective in search.objectives):
        yield (
            f"search.early_stop: {search.early_stop} judges trials epoch by epoch, and no objective changes with the "
            "epochs. Write none."
        )
    if search.early_stop is None and search.grace_epochs is not None:
        yield "search.grace_epochs: has no effect with search.early_stop=none. Remove it."


def _budget(config: "Config", search: "Search") -> Iterator[str]:
    if search.max_gpu_hours is not None and not config.cluster.gpus_per_worker:
        yield (
            f"search.max_gpu_hours: {search.max_gpu_hours:g}, but with cluster.gpus_per_worker=0 trials use no GPU. "
            "Use search.max_minutes."
        )
