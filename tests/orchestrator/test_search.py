import json
import pickle
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import ASHAScheduler

from dabnn.errors import InvalidInputError
from orchestrator.config import Config, Search, load_config
from orchestrator.search import END, START, DrawPoint, grid_points, make_scheduler, make_searcher, trial_config

BASE = ["name=run", "model.name=bincifar", "data.train=shards", "train.epochs=40"]
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


def test_a_drawn_range_of_layers_is_never_empty() -> None:
    draw = DrawPoint(search_of(SPACE).space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = []
    for _ in range(200):
        trial = study.ask()
        draw(trial)
        points.append(trial.params)
        study.tell(trial, 0.0)
    assert all(set(point) == set(SPACE) for point in points)
    assert all(2 <= point[START] <= point[END] <= 7 for point in points)
    assert {(point[START], point[END]) for point in points} == {(a, b) for a in range(2, 8) for b in range(a, 8)}
    assert all(1e-4 <= point["optim.max_lr"] <= 1e-2 for point in points)
    assert {point["schedule.name"] for point in points} == {"decay", "cosine"}


def test_the_end_is_drawn_from_what_the_start_leaves() -> None:
    draw = DrawPoint(search_of({START: SPACE[START], END: SPACE[END]}).space)
    draw(optuna.trial.FixedTrial({START: 5, END: 6}))
    with pytest.warns(UserWarning, match="out of the range"):
        draw(optuna.trial.FixedTrial({START: 5, END: 4}))


def test_what_draws_points_can_be_pickled_as_tune_does() -> None:
    draw = DrawPoint(search_of(SPACE).space)
    assert pickle.loads(pickle.dumps(draw)) == draw


def test_a_grid_is_every_point_whose_range_of_layers_is_not_empty() -> None:
    space = {START: {"int": [2, 3]}, END: {"choice": [2, 3]}, "schedule.name": {"choice": ["decay", "cosine"]}}
    points = grid_points(search_of(space, algorithm="grid").space)
    assert [(point[START], point[END]) for point in points[::2]] == [(2, 2), (2, 3), (3, 3)]
    assert [point["schedule.name"] for point in points] == ["decay", "cosine"] * 3


def test_a_grid_of_a_continuous_range_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^search\.space\.optim\.max_lr: a grid has no points for a log range"):
        grid_points(search_of({"optim.max_lr": {"log": [1e-4, 1e-2]}}).space)


def test_a_trial_has_no_search_and_its_own_number_of_epochs() -> None:
    space = {START: {"int": [2, 3]}}
    assert trial_config(config(space, epochs=6)).train.epochs == 6
    assert trial_config(config(space)).train.epochs == 40
    assert trial_config(config(space)).search is None


def test_a_grid_needs_no_searcher_and_the_others_draw_their_points() -> None:
    grid, space, samples = make_searcher(search_of({START: {"int": [2, 4]}}, algorithm="grid"), seed=1)
    assert (grid, samples) == (None, 1)
    assert space == {"point": {"grid_search": [{START: 2}, {START: 3}, {START: 4}]}}
    for algorithm in ("tpe", "random"):
        searcher, space, samples = make_searcher(search_of(SPACE, algorithm=algorithm, num_trials=7), seed=1)
        assert (space, samples) == ({}, 7)
        assert set(searcher.suggest("a")) == set(SPACE)


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


@pytest.mark.parametrize(("values", "epochs"), [({"early_stop": None}, 40), ({}, 3), ({}, 1)])
def test_trials_that_shall_end_or_are_too_short_to_judge_are_not_stopped(values: dict[str, Any], epochs: int) -> None:
    assert make_scheduler(search_of({START: {"int": [2, 3]}}, **values), epochs) is None
