"""Ready spaces: what they hold, what a user changes of them, and that every point of them is a configuration."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from dabnn.errors import InvalidInputError
from orchestrator.config import Config, load_config, resolve_paths, to_yaml, with_overrides
from orchestrator.config_search import Search
from orchestrator.config_space import END, START
from orchestrator.points import draw
from orchestrator.search import check_trials, trial_config

BASE = ["name=run", "model.name=bincifarfbin", "model.num_classes=10", "data.train=shards"]


def loaded(*overrides: str) -> tuple[Config, Search]:
    config = load_config(None, [*BASE, *overrides])
    assert config.search is not None
    return config, config.search


@pytest.mark.parametrize("epochs", [1, 2, 3, 6, 40, 600])
@pytest.mark.parametrize("preset", ["reference", "quick"])
def test_every_point_of_a_preset_is_a_configuration(preset: str, epochs: int) -> None:
    config, search = loaded(f"search.preset={preset}", f"train.epochs={epochs}")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        with_overrides(trial_config(config), draw(study.ask(), search.space))
    check_trials(config)


def test_the_reference_preset_has_the_range_and_every_schedule_with_its_own_keys() -> None:
    _, search = loaded("search.preset=reference", "train.epochs=100")
    space = search.space
    assert space[START].values == space[END].values == (2, 7), "of 8 layers, the first and the last stay real"
    assert set(space["schedule.name"].values) == {"decay", "step", "cosine", "linear", "one_cycle", "constant"}
    assert space["schedule.interval"].values == (10, 50)
    assert (50, 75) in space["schedule.milestones"].values
    assert space["optim.max_lr"].values == (1e-4, 1e-2)
    assert (search.preset, search.num_trials) == (None, 20)


def test_the_rates_of_a_preset_follow_the_optimizer_and_its_lowest_rate() -> None:
    _, sgd = loaded("search.preset=quick", "optim.name=sgd")
    assert sgd.space["optim.max_lr"].values == (5e-3, 0.5)
    _, adam = loaded("search.preset=quick", "optim.min_lr=1e-3", "optim.max_lr=2e-3")
    assert adam.space["optim.max_lr"].values == (1e-3, 1e-2)


def test_the_quick_preset_is_few_short_trials_unless_the_search_says_otherwise() -> None:
    _, search = loaded("search.preset=quick", "train.epochs=40")
    assert (search.num_trials, search.epochs, len(search.space)) == (8, 10, 3)
    _, search = loaded("search.preset=quick", "train.epochs=40", "search.num_trials=30", "search.epochs=5")
    assert (search.num_trials, search.epochs) == (30, 5)


def test_entries_of_the_space_replace_those_of_the_preset_and_null_removes_one() -> None:
    changes = ["search.space.optim.max_lr={choice: [1e-3, 2e-3]}", f"search.space.{START}=null", f"{START}=2"]
    _, search = loaded("search.preset=quick", *changes, "search.space.binarize.weights={choice: [dab, xnor]}")
    assert set(search.space) == {END, "optim.max_lr", "binarize.weights"}
    assert search.space["optim.max_lr"].kind == "choice"


def test_a_preset_leaves_the_layers_alone_where_they_are_chosen_otherwise() -> None:
    for change in (
        "binarize.layers=[2, 3]",
        "search.space.binarize.layers={subset: [2, 3]}",
        "binarize.plan={weights: [2]}",
    ):
        _, search = loaded("search.preset=quick", change)
        assert not {START, END} & set(search.space)


def test_a_preset_is_shown_as_what_it_stands_for_and_reads_back_as_the_same(tmp_path: Path) -> None:
    config, _ = loaded("search.preset=reference")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert "schedule.milestones" in to_yaml(config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=bincifr", "search.preset=quick"], "bincifr"),
        (["search.preset=quick", "search.space=3"], "search.space: 3 must be a mapping"),
        (["search.preset=quick", "train.epochs=many"], 'train.epochs: "many" must be a whole number'),
        (["search.preset=quick", "model=3"], "model: 3 must be a mapping"),
        (["search.preset=quick", "optim.min_lr=1"], "search.space.optim.max_lr"),
        (["search={}"], "search.space: missing"),
    ],
)
def test_a_preset_for_what_is_no_configuration_is_refused_in_its_words(overrides: list[str], expected: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        loaded(*overrides)
    assert expected in str(caught.value)


def test_the_files_of_searched_plans_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("weights: [2]\n")
    plans: dict[str, Any] = {"choice": ["plan.yaml", {"weights": [3], "inputs": []}]}
    config, _ = loaded(f"search.space.binarize.plan={json.dumps(plans)}")
    resolved = resolve_paths(config, tmp_path).search
    assert resolved is not None
    assert resolved.space["binarize.plan"].values[0] == str(tmp_path / "plan.yaml")
