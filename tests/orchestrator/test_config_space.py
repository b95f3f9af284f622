"""Points of a search space that a rule forbids, in the run or in a stage of it, and axes that cannot be searched."""

from typing import Any

import pytest
import yaml

from dabnn.errors import InvalidInputError
from orchestrator.config import Config, load_config, with_overrides
from orchestrator.config_errors import known_keys
from orchestrator.config_space import points

BASE = ["name=run", "model.name=bincifarfbin", "data.train=shards"]
STAGE: dict[str, Any] = {"name": "a", "epochs": 6}


def loaded(space: dict[str, Any], *overrides: str) -> Config:
    search = {"early_stop": "none", "space": space}
    return load_config(None, [*BASE, *overrides, f"search={yaml.safe_dump(search, default_flow_style=True)}"])


def refusal(space: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        loaded(space, *overrides)
    return str(caught.value)


def stages(*written: dict[str, Any]) -> str:
    entries = [STAGE | {"name": str(number)} | values for number, values in enumerate(written)]
    return f"train.stages={yaml.safe_dump(entries, default_flow_style=True, width=10_000)}"


@pytest.mark.parametrize(
    ("space", "overrides", "expected"),
    [
        (
            {"binarize.inputs": {"choice": ["model", "none"]}},
            ["binarize.plan={weights: [2], inputs: [2]}"],
            'a trial could get binarize.inputs="none". binarize.inputs: binarize.plan already names',
        ),
        (
            {"binarize.layers": {"subset": [2, 3]}},
            ["binarize.bin_start=2"],
            "a trial could get binarize.layers=[2, 3]. binarize.layers: binarize.bin_start already chose",
        ),
        (
            {"schedule.milestones": {"choice": [[3], [3, 300]]}},
            ["schedule={name: step, milestones: [2]}"],
            "a trial could get schedule.milestones=[3, 300]. schedule.milestones: 300 is not below",
        ),
        (
            {"binarize.bin_end": {"int": [1, 7]}},
            [stages({"binarize": {"bin_start": 2}})],
            "a trial could get binarize.bin_end=1. train.stages[0] (0): binarize.bin_end: 1 comes before",
        ),
        (
            {"schedule.warmup_epochs": {"float": [0, 8]}},
            [stages({}, {})],
            "a trial could get schedule.warmup_epochs=8.0. train.stages[0] (0): schedule.warmup_epochs: 8.0 is all of",
        ),
        (
            {"optim.max_lr": {"log": [1e-4, 1e-2]}},
            [stages({}, {"optim": {"min_lr": 1e-3}})],
            "a trial could get optim.max_lr=0.0001. train.stages[1] (1): optim.min_lr: 0.001 is above",
        ),
        (
            {"model.in_channels": {"choice": [1, 3]}},
            ["data.mean=[0.5]", "data.std=[0.5]"],
            "a trial could get model.in_channels=3. data.mean, data.std: 1 and 1 values for 3 channels.",
        ),
    ],
)
def test_a_point_that_breaks_a_rule_is_refused(space: dict[str, Any], overrides: list[str], expected: str) -> None:
    assert refusal(space, *overrides).startswith(f"search.space: {expected}")


@pytest.mark.parametrize(
    ("space", "overrides"),
    [
        ({"binarize.inputs": {"choice": ["model", "none"]}}, []),
        ({"binarize.layers": {"subset": [2, 3, "conv4"]}, "binarize.inputs": {"subset": [2, 3]}}, []),
        ({"binarize.plan": {"choice": [{"weights": [2], "inputs": []}, None]}}, []),
        ({"schedule.name": {"choice": ["step", "cosine"]}, "schedule.milestones": {"choice": [[3], [3, 5]]}}, []),
        ({"binarize.bin_end": {"int": [2, 7]}}, [stages({"binarize": {"bin_start": 2}})]),
        ({"binarize.bin_end": {"int": [1, 7]}}, [stages({"binarize": {"layers": [2]}}, {})]),
        ({"schedule.warmup_epochs": {"float": [0, 8]}}, [stages({"schedule": {"warmup_epochs": 1}}, {"epochs": 9})]),
    ],
)
def test_every_point_of_a_space_that_is_taken_is_a_configuration(space: dict[str, Any], overrides: list[str]) -> None:
    config = loaded(space, *overrides)
    assert config.search is not None
    for point in points(config.search, list(space)):
        assert with_overrides(config.model_copy(update={"search": None}), point).search is None


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("train.epochs", {}),
        ("optim.weight_decay", {"optim": {"weight_decay": 0.1}}),
        ("binarize.bin_end", {"binarize": {"layers": [2]}}),
    ],
)
def test_a_key_that_every_stage_sets_is_not_searched(key: str, written: dict[str, Any]) -> None:
    message = refusal({key: {"int": [2, 3]}}, stages(written, written))
    assert message.startswith(f"search.space.{key}: each stage in train.stages sets its own")


def test_milestones_beyond_the_epochs_of_a_trial_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^schedule\.milestones: 4 is not below search\.epochs=3"):
        load_config(
            None, [*BASE, "schedule={name: step, milestones: [4]}", "search={epochs: 3, space: {seed: {int: [1, 2]}}}"]
        )


@pytest.mark.parametrize(
    "key",
    ["train.distill", "train.kurtosis", "data.mean", "data.std", "model.num_classes", "train.distill.teacher"],
)  # fmt: skip
def test_a_key_that_trials_share_is_not_called_unknown(key: str) -> None:
    assert key in known_keys(Config)
    assert refusal({key: {"choice": ["a"]}}).startswith(f"search.space.{key}: cannot differ between the trials")
