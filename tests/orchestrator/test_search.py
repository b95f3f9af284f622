import json
import pickle
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from orchestrator.config import Config, Search, load_config
from orchestrator.config_space import END, START
from orchestrator.search import DrawPoint, make_scheduler, make_searcher, network_metrics, trial_config

BASE = ["name=run", "model.name=bincifar", "model.num_classes=10", "data.train=shards", "train.epochs=40"]
SPACE: dict[str, Any] = {
    "optim.max_lr": {"log": [1e-4, 1e-2]},
    END: {"int": [2, 7]},
    START: {"int": [2, 7]},
    "schedule.name": {"choice": ["decay", "cosine"]},
    "optim.weight_decay": {"float": [0.0, 0.1]},
}


def config(space: dict[str, Any], **search: Any) -> Config:
    values = {"space": space, "num_trials": 100, **search}
    return load_config(None, [*BASE, f"search={json.dumps(values)}"])


def search_of(space: dict[str, Any], **values: Any) -> Search:
    search = config(space, **values).search
    assert search is not None
    return search


def test_what_draws_points_can_be_pickled_as_tune_does() -> None:
    draw = DrawPoint(search_of(SPACE).space)
    assert pickle.loads(pickle.dumps(draw)) == draw
    assert set(draw(optuna.create_study().ask())) == set(SPACE)


def test_a_trial_has_no_search_and_its_own_number_of_epochs() -> None:
    space = {START: {"int": [2, 3]}}
    assert trial_config(config(space, epochs=6)).train.epochs == 6
    assert trial_config(config(space)).train.epochs == 40
    assert trial_config(config(space)).search is None


def test_the_cost_of_a_network_is_known_without_training() -> None:
    few, many = (network_metrics(config(SPACE), {START: 2, END: end}) for end in (2, 6))
    assert many["packed_bytes"] < few["packed_bytes"]
    assert (
        network_metrics(config(SPACE), {START: 2, END: 6, "binarize.inputs": [2, 3]})["bit_ops"] > few["bit_ops"] == 0
    )
    assert network_metrics(config(SPACE), {START: 99}) == {}


def test_a_grid_needs_no_searcher_and_the_others_draw_their_points() -> None:
    grid, space, samples = make_searcher(search_of({START: {"int": [2, 4]}}, algorithm="grid"), seed=1)
    assert (grid, samples) == (None, 1)
    assert space == {"point": {"grid_search": [{START: 2}, {START: 3}, {START: 4}]}}
    for algorithm in ("tpe", "random"):
        searcher, space, samples = make_searcher(search_of(SPACE, algorithm=algorithm, num_trials=7), seed=1)
        assert (space, samples) == ({}, 7)
        points = [searcher.suggest(str(number)) for number in range(20)]
        assert all(set(point) == set(SPACE) and point[START] <= point[END] for point in points)


def test_the_same_seed_proposes_the_same_points() -> None:
    def proposed(seed: int) -> list[Any]:
        searcher, _, _ = make_searcher(search_of(SPACE), seed)
        return [searcher.suggest(str(number)) for number in range(3)]

    assert proposed(1) == proposed(1) != proposed(2)


def test_no_trial_is_stopped_in_its_first_quarter_nor_before_the_third_epoch() -> None:
    space = {START: {"int": [2, 3]}}
    scheduler = make_scheduler(search_of(space), epochs=40)
    assert isinstance(scheduler, ASHAScheduler)
    assert (scheduler._max_t, scheduler._brackets[0]._rungs[-1][0]) == (41, 10)
    assert make_scheduler(search_of(space), epochs=6)._brackets[0]._rungs[-1][0] == 3


def test_grace_and_reduction_can_be_chosen() -> None:
    scheduler = make_scheduler(search_of({START: {"int": [2, 3]}}, grace_epochs=4, reduction=3), epochs=40)
    assert [rung[0] for rung in scheduler._brackets[0]._rungs] == [36, 12, 4]


def test_trials_can_be_held_against_the_median_of_the_others() -> None:
    objectives = [{"metric": "packed_bytes"}, {"metric": "val_loss"}]
    search = search_of({START: {"int": [2, 3]}}, early_stop="median", objectives=objectives)
    scheduler = make_scheduler(search, epochs=40)
    assert isinstance(scheduler, MedianStoppingRule)
    assert (scheduler._metric, scheduler._worst, scheduler._grace_period) == ("val_loss", float("inf"), 10)


@pytest.mark.parametrize(("values", "epochs"), [({"early_stop": None}, 40), ({}, 3), ({}, 1)])
def test_trials_that_shall_end_or_are_too_short_to_judge_are_not_stopped(values: dict[str, Any], epochs: int) -> None:
    assert make_scheduler(search_of({START: {"int": [2, 3]}}, **values), epochs) is None
