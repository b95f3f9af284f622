"""Every point of a space can be run, by construction, and has the same parameters whatever was drawn before."""

from typing import Any

import optuna
import pytest

from dabnn.errors import InvalidInputError
from orchestrator.config_search import Domain
from orchestrator.config_space import END, START
from orchestrator.points import draw, drawing_order, grid, parameters

LAYERS = {START: {"int": [2, 7]}, END: {"int": [2, 7]}}
SCHEDULES = {
    "schedule.interval": {"int": [5, 50]},
    "schedule.milestones": {"choice": [[20], [20, 30]]},
    "schedule.level": {"log": [1.5, 10.0]},
    "schedule.name": {"choice": ["decay", "step", "cosine"]},
}
OWN_KEYS = {
    "decay": {"schedule.interval", "schedule.level"},
    "step": {"schedule.milestones", "schedule.level"},
    "cosine": set(),
}


def space_of(raw: dict[str, Any]) -> dict[str, Domain]:
    return {key: Domain.model_validate(domain) for key, domain in raw.items()}


def drawn(raw: dict[str, Any], num: int = 300) -> list[tuple[dict[str, Any], optuna.trial.FrozenTrial]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(num):
        values = draw(study.ask(), space_of(raw))
        found.append((values, study.trials[-1]))
    return found


def test_every_range_of_layers_is_drawn_and_none_is_empty() -> None:
    found = drawn(LAYERS)
    assert {(values[START], values[END]) for values, _ in found} == {(a, b) for a in range(2, 8) for b in range(a, 8)}


def test_the_end_has_the_same_distribution_whatever_the_start_is() -> None:
    assert len({str(trial.distributions[END]) for _, trial in drawn(LAYERS)}) == 1


def test_ranges_of_start_and_end_that_do_not_overlap_are_drawn_as_they_are() -> None:
    apart = {START: {"int": [2, 4]}, END: {"int": [4, 7]}}
    assert all(values == trial.params for values, trial in drawn(apart, num=20))


def test_a_start_may_also_be_left_to_the_model() -> None:
    found = drawn(LAYERS | {START: {"choice": [None, 5]}})
    assert {values[END] for values, _ in found if values[START] is None} == set(range(2, 8))
    assert {values[END] for values, _ in found if values[START] == 5} == {5, 6, 7}


def test_keys_of_a_schedule_are_drawn_with_it_only_and_after_it() -> None:
    for values, _ in drawn(SCHEDULES):
        assert set(values) - {"schedule.name"} == OWN_KEYS[values["schedule.name"]]
    assert drawing_order(space_of(SCHEDULES))[0] == "schedule.name"


def test_a_key_behind_two_others_is_drawn_with_both() -> None:
    raw = {
        "binarize.ste_width": {"float": [0.5, 2.0]},
        "binarize.ste": {"choice": ["clipped", "identity"]},
        "binarize.gradient": {"choice": ["means", "reference"]},
    }
    found = {tuple(values) for values, _ in drawn(raw, num=100)}
    gradient, ste = "binarize.gradient", "binarize.ste"
    assert found == {(gradient,), (gradient, ste), (gradient, ste, "binarize.ste_width")}


def test_a_subset_has_or_has_not_each_entry() -> None:
    raw = {"binarize.layers": {"subset": [2, "conv3", 4]}, "binarize.inputs": {"subset": [2]}}
    found = [values for values, _ in drawn(raw)]
    assert len({tuple(values["binarize.layers"]) for values in found}) == 8
    assert {str(values["binarize.inputs"]) for values in found} == {"[2]", "none"}


def test_a_plan_is_a_choice_of_mappings_and_files() -> None:
    plans = ["plan.yaml", {"weights": [2, 3], "inputs": []}, None]
    found = [values["binarize.plan"] for values, _ in drawn({"binarize.plan": {"choice": plans}}, num=40)]
    assert all(plan in plans for plan in found)
    assert len({str(plan) for plan in found}) == 3


def test_a_point_is_drawn_again_from_its_parameters() -> None:
    raw = LAYERS | SCHEDULES | {"binarize.inputs": {"subset": [2, 3]}, "optim.max_lr": {"log": [1e-4, 1e-2]}}
    space = space_of(raw)
    for values, _ in drawn(raw, num=50):
        assert draw(optuna.trial.FixedTrial(parameters(space, values)), space) == values


def test_what_a_space_does_not_hold_has_no_parameter() -> None:
    space = space_of(LAYERS | SCHEDULES)
    assert parameters(space, {START: 9, END: 5, "seed": 3, "schedule.name": "linear"}) == {}
    assert parameters(space, {START: 5, END: 4}) == {START: 5}
    assert parameters(space, {"schedule.name": "cosine", "schedule.interval": 7}) == {"schedule.name": "cosine"}


def test_a_grid_is_every_point_that_can_be_run_once() -> None:
    raw = {START: {"int": [2, 3]}, END: {"choice": [2, 3]}} | SCHEDULES | {"schedule.level": {"choice": [2.0, 4.0]}}
    raw["schedule.interval"] = {"int": [5, 6]}
    points = list(grid(space_of(raw)))
    assert {(point[START], point[END]) for point in points} == {(2, 2), (2, 3), (3, 3)}
    by_name = [point["schedule.name"] for point in points if point[START] == 3]
    assert {name: by_name.count(name) for name in by_name} == {"decay": 4, "step": 4, "cosine": 1}
    assert len({str(point) for point in points}) == len(points) == 27


def test_a_grid_has_every_subset() -> None:
    points = list(grid(space_of({"binarize.layers": {"subset": [2, 3]}})))
    assert points == [{"binarize.layers": layers} for layers in ([], [3], [2], [2, 3])]


def test_a_grid_of_a_continuous_range_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^search\.space\.optim\.max_lr: a grid has no points for a log range"):
        list(grid(space_of({"optim.max_lr": {"log": [1e-4, 1e-2]}})))
