"""What is chosen for a folder of images: pure functions, and files that say the same as the choices."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from orchestrator.config import Config, load_config, to_dict
from orchestrator.first_config import Choice, batch_size, choose, epochs, flow, input_size, to_text, width
from orchestrator.image_folder import Found
from orchestrator.search import check_trials

SMALL = Found(
    source="/photos",
    name="photos",
    format="folder",
    classes=("ant", "bee"),
    class_counts=(500, 500),
    num_train=1000,
    num_val=250,
    val_fraction=0.2,
    channels=3,
    width=640,
    height=480,
    max_side=480,
)
LARGE = replace(SMALL, class_counts=(50_000, 50_000), num_train=100_000, num_val=10_000, val_fraction=None)
GREY = replace(SMALL, channels=1, width=8, height=8, max_side=8)


def configured(found: Found, num_gpus: int = 0, *changes: str) -> Config:
    chosen = [choice.override for choice in choose(found, num_gpus)]
    return load_config(None, [*chosen, "data.train=shards/photos", "model.num_classes=2", *changes])


@pytest.mark.parametrize(
    ("side", "num_train", "expected"),
    [
        (8, 500, 16),
        (28, 50_000, 32),
        (32, 900, 32),
        (64, 900, 96),
        (105, 3_630, 96),
        (480, 1_000, 96),
        (480, 6_000, 128),
        (480, 100_000, 224),
        (150, 100_000, 128),
    ],
)
def test_the_input_grows_with_the_images_and_their_number(side: int, num_train: int, expected: int) -> None:
    assert input_size(side, num_train)[0] == expected


@pytest.mark.parametrize(
    ("num_train", "batch", "passes"), [(10, 16, 60), (960, 16, 50), (3_630, 64, 53), (50_000, 256, 30)]
)
def test_batches_and_epochs_leave_enough_steps(num_train: int, batch: int, passes: int) -> None:
    assert batch_size(num_train) == batch
    assert epochs(num_train, batch) == passes


@pytest.mark.parametrize(("num_train", "num_gpus", "expected"), [(900, 0, 0.25), (900, 1, 0.5), (90_000, 4, 1.0)])
def test_the_width_is_what_the_machine_can_train(num_train: int, num_gpus: int, expected: float) -> None:
    assert width(num_train, num_gpus)[0] == expected


def test_inputs_are_binary_where_there_are_many_images_and_a_gpu() -> None:
    assert configured(LARGE).model.name == configured(SMALL, 1).model.name == "resnetwbin18"
    many = configured(LARGE, 2)
    assert (many.model.name, many.model.block) == ("resnetfbin18", "bireal")
    assert (many.cluster.gpus_per_worker, many.data.transform) == (1, "imagenet")


def test_grey_images_are_not_mirrored() -> None:
    assert (configured(GREY).model.in_channels, configured(GREY).data.transform) == (1, "plain")
    assert (configured(SMALL).model.in_channels, configured(SMALL).data.transform) == (3, "crop_flip")


@pytest.mark.parametrize("found", [SMALL, LARGE, GREY])
@pytest.mark.parametrize("num_gpus", [0, 2])
def test_every_trial_of_the_search_can_run_and_there_are_two_objectives(found: Found, num_gpus: int) -> None:
    config = configured(found, num_gpus)
    assert config.search is not None
    assert [(each.metric, each.mode) for each in config.search.objectives] == [
        ("val_top1", "max"),
        ("packed_bytes", "min"),
    ]
    assert config.search.num_trials <= 10
    assert config.search.early_stop is None, "it would end what is small, not accurate"
    check_trials(config)


@pytest.mark.parametrize("name", ["photos", "my photos", "0815", "null", "Käfer: alle", "no"])
@pytest.mark.parametrize("num_gpus", [0, 2])
def test_the_file_says_the_same_as_the_choices(name: str, num_gpus: int, tmp_path: Path) -> None:
    found = replace(LARGE if num_gpus else SMALL, name=name, notes=("val was drawn",))
    file = tmp_path / "dab.yaml"
    file.write_text(to_text(found, choose(found, num_gpus), "photos", "dab.yaml"), encoding="utf-8")
    read = load_config(file, ["model.num_classes=2", "data.train=shards/photos"])
    assert to_dict(read) == to_dict(configured(found, num_gpus))
    assert read.name == name


def test_the_file_has_a_reason_beside_each_choice_and_the_commands_above() -> None:
    text = to_text(SMALL, choose(SMALL), "'my photos'", "dab.yaml")
    assert "dab submit dab.yaml --images 'my photos' --sweep" in text
    assert "dab data build 'my photos' shards/photos --val-fraction 0.2" in text
    for choice in choose(SMALL):
        assert choice.reason in text
    assert sum(not choice.reason for choice in choose(SMALL)) <= 4


def test_another_model_can_be_named_beside_the_choices() -> None:
    assert configured(SMALL, 0, "model.name=bincifar", "model.width=1").model.name == "bincifar"


@pytest.mark.parametrize("value", [None, True, 3, 0.25, "a", "no", "a b", "1e3", "ö: {", ["a", {"b": [1, 2.0]}], ""])
def test_values_are_read_back_from_one_line(value: object) -> None:
    assert yaml.safe_load(flow(value)) == value
    assert Choice("a.b", value).override == f"a.b={flow(value)}"
