"""What the section `data` refuses about transforms, ten crops and fixed statistics."""

import pytest

from dabnn.errors import InvalidInputError
from orchestrator.config import flatten, load_config, to_yaml
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
