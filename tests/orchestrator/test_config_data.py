"""What the section `data` refuses, and how its keys reach the loop."""

from dataclasses import asdict
from pathlib import Path

import pytest

from dabnn.errors import InvalidInputError
from dabnn.spec import AugmentSpec, DataSpec
from orchestrator.config import flatten, load_config, resolve_paths, to_yaml
from orchestrator.resolve import train_spec

SMALL = ["name=run", "model.name=sketchanetfbin", "data.train=shards"]


def refusal(*overrides: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        load_config(None, [*SMALL, *overrides])
    return str(caught.value)


def test_ten_crops_need_a_transform_that_crops() -> None:
    assert refusal("data.ten_crop=true", "data.transform=crop_flip").startswith(
        "data.ten_crop: true, but data.transform=crop_flip resizes images to the very size of the input"
    )
    assert load_config(None, [*SMALL, "data.ten_crop=true", "data.transform=sketch"]).data.ten_crop


def test_no_trial_of_a_search_meets_a_transform_that_does_not_crop() -> None:
    space = "search.space.data.transform={choice: [sketch, plain]}"
    assert "a trial could get data.transform=" in refusal("data.ten_crop=true", "data.transform=sketch", space)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mean=[0.1]"], "data.std: is null and the other is not. Give both, or neither."),
        (["data.std=[0.1]"], "data.mean: is null and the other is not."),
        (["data.mean=[0.1, 0.2]", "data.std=[0.1]"], "data.mean, data.std: 2 and 1 values for 2 channels."),
        (["data.mean=[0.1]", "data.std=[0.1]", "model.in_channels=3"], "data.mean, data.std: 1 and 1 values for 3"),
        (["data.mean=[1.5]", "data.std=[0.1]"], "data.mean"),
        (["data.mean=[0.5]", "data.std=[0]"], "data.std"),
    ],
)
def test_a_fixed_mean_and_deviation_come_together_one_a_channel(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


def test_a_fixed_mean_and_deviation_reach_the_loop() -> None:
    config = load_config(None, [*SMALL, "data.mean=[0.06]", "data.std=[0.93]", "data.transform=sketch"])
    spec = train_spec(config).data
    assert (list(spec.mean or ()), list(spec.std or ()), spec.transform) == ([0.06], [0.93], "sketch")
    assert flatten(config)["data.mean"] == "[0.06]"
    assert "- 0.93" in to_yaml(config)


def test_keys_in_gigabytes_and_augmentations_reach_the_loop() -> None:
    augment = "data.augment={randaugment: {num_ops: 3}, erasing: 0.25, mixup: 0.2, cutmix: 1}"
    keys = [augment, "data.cache_gb=1.5", "data.decoded_cache_gb=0.5", "data.window=100", "data.max_bad_fraction=0.01"]
    spec = train_spec(load_config(None, [*SMALL, *keys, "data.cache_folder=/cache", "data.retry_s=5"])).data
    assert spec.augment == AugmentSpec(3, 9, 0.25, 0.2, 1.0)
    assert (spec.cache_bytes, spec.decoded_cache_bytes) == (1_500_000_000, 500_000_000)
    assert (spec.window, spec.max_bad_fraction, spec.cache_folder, spec.retry_s) == (100, 0.01, "/cache", 5.0)
    assert DataSpec.from_dict(asdict(spec)) == spec


def test_without_a_word_nothing_is_augmented_cached_or_tolerated() -> None:
    spec = train_spec(load_config(None, SMALL)).data
    assert spec == DataSpec("shards", "shards", 256, eval_batch_size=64, num_loaders=2)
    assert not spec.augment.is_mixing


def test_a_relative_cache_folder_starts_where_the_configuration_is_read(tmp_path: Path) -> None:
    config = resolve_paths(load_config(None, [*SMALL, "data.cache_folder=here"]), tmp_path)
    assert config.data.cache_folder == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.augment.randaugment={num_ops: 0}", "data.augment.randaugment.num_ops: 0 must be at least 1"),
        ("data.augment.randaugment.magnitude=31", "data.augment.randaugment.magnitude: 31 must be at most 30"),
        ("data.augment.erasing=1.1", "data.augment.erasing: 1.1 must be at most 1"),
        ("data.augment.mixup=-1", "data.augment.mixup: -1 must be at least 0"),
        ("data.augment.jitter=1", "data.augment.jitter: unknown key"),
        ("data.window=0", "data.window: 0 must be at least 1"),
        ("data.max_bad_fraction=1", "data.max_bad_fraction: 1 must be less than 1"),
        ("data.cache_gb=0", "data.cache_gb: 0 must be more than 0"),
        ("data.cache_folder=''", 'data.cache_folder: "" must be some text'),
        ("data.retry_s=-1", "data.retry_s: -1 must be at least 0"),
        ("search.space.data.cache_gb={choice: [1, 2]}", "search.space.data.cache_gb: cannot differ between the trials"),
    ],
)
def test_values_outside_their_limits_are_refused_by_key(override: str, message: str) -> None:
    assert refusal(override).startswith(message)


def test_a_search_may_vary_an_augmentation() -> None:
    space = "search.space.data.augment.mixup={choice: [0.0, 0.2]}"
    ops = "search.space.data.augment.randaugment.num_ops={int: [1, 3]}"
    assert load_config(None, [*SMALL, space, ops]).search
