"""Evaluation on ten crops, from the stream of images to the metrics of a run."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from training import small_spec

from dabnn.checkpoints import best_checkpoint
from dabnn.data import Batch, build_dataset, load_manifest, open_stream
from dabnn.data.transforms import Transform, make_transform, normalization_for
from dabnn.deliver import evaluate_on, export, load_trained, predict, prepare
from dabnn.distributed import World
from dabnn.errors import InvalidInputError
from dabnn.evaluate import count, crop_scores
from dabnn.packed import Normalization, load_packed
from dabnn.packed_file import Content, read, write
from dabnn.run_folder import RunFolder
from dabnn.train import train

SIZE = 16


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark strokes on white sheets of different sizes: crosses and bars, 30 to learn from and 10 to evaluate."""
    generator = np.random.default_rng(0)
    source = tmp_path_factory.mktemp("drawings")
    for split, number in (("train", 15), ("val", 5)):
        for label in ("bar", "cross"):
            folder = source / split / label
            folder.mkdir(parents=True)
            for position in range(number):
                width, height = (int(side) for side in generator.integers(24, 40, 2))
                image = Image.new("L", (width, height), 255)
                ImageDraw.Draw(image).line((2, 2, width - 3, height - 3), fill=0, width=2)
                if label == "cross":
                    ImageDraw.Draw(image).line((2, height - 3, width - 3, 2), fill=0, width=2)
                image.save(folder / f"{position}.png")
    root = tmp_path_factory.mktemp("shards") / "drawings"
    build_dataset(str(source), root)
    return root


def sketch(root: Path, *, training: bool, ten_crop: bool = False) -> Transform:
    mean, std = normalization_for("sketch", load_manifest(root).image, 1)
    return make_transform(
        "sketch", input_size=SIZE, in_channels=1, mean=mean, std=std, training=training, ten_crop=ten_crop
    )


def linear(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, num_classes)).eval()


def log_probabilities(net: nn.Module, image: torch.Tensor) -> np.ndarray:
    logits = net(image[None])[0].detach().numpy().astype(np.float64)
    return logits - math.log(np.exp(logits).sum())


def crops_of(num_samples: int) -> torch.Tensor:
    return torch.randn(num_samples, 10, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_ten_crops_score_the_mean_of_their_log_probabilities() -> None:
    net, crops = linear(), crops_of(3)
    expected = [np.mean([log_probabilities(net, crop) for crop in sample], axis=0) for sample in crops]
    assert np.allclose(crop_scores(net, crops).detach().numpy(), np.array(expected), atol=1e-6)


def test_the_loss_on_ten_crops_is_the_mean_of_the_crops_cross_entropies() -> None:
    net, crops, labels = linear(), crops_of(6), torch.tensor([0, 1, 2, 3, 0, 1])
    totals = count(net, [Batch(crops, labels, torch.arange(6), 6)], torch.device("cpu"))
    scores = np.array([[log_probabilities(net, crop) for crop in sample] for sample in crops])
    losses = [-scores[sample, crop, label] for sample, label in enumerate(labels) for crop in range(10)]
    assert totals.loss / totals.num_samples == pytest.approx(np.mean(losses), rel=1e-5)
    assert totals.top1 == (scores.mean(axis=1).argmax(axis=1) == labels.numpy()).sum()
    assert totals.num_samples == 6


def test_ten_equal_crops_count_as_the_image_itself() -> None:
    net, image, labels = linear(), crops_of(4)[:, 0], torch.tensor([3, 2, 1, 0])
    one = count(net, [Batch(image, labels, torch.arange(4), 4)], torch.device("cpu"))
    ten = count(
        net, [Batch(image[:, None].expand(-1, 10, -1, -1, -1), labels, torch.arange(4), 4)], torch.device("cpu")
    )
    assert ten.metrics("") == pytest.approx(one.metrics(""), rel=1e-6)


def test_a_stream_of_ten_crops_holds_the_centre_crop_of_every_sample(drawings: Path) -> None:
    streams = [
        open_stream(
            drawings, "val", batch_size=4, shuffle=False, transform=sketch(drawings, training=False, ten_crop=t)
        )
        for t in (True, False)
    ]
    for crops, single in zip(*(stream.epoch(0) for stream in streams), strict=True):
        assert crops.images.shape == (len(single.labels), 10, 1, SIZE, SIZE)
        assert torch.equal(crops.images[:, 4], single.images)


def by_sample(batches: Iterator[Batch]) -> dict[int, torch.Tensor]:
    return {
        index: image for batch in batches for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }


@pytest.mark.parametrize(("num_loaders", "world_size"), [(0, 2), (2, 1)])
def test_an_augmented_drawing_depends_on_seed_epoch_and_sample_alone(
    drawings: Path, num_loaders: int, world_size: int
) -> None:
    arguments = {"batch_size": 6, "transform": sketch(drawings, training=True)}
    whole = by_sample(open_stream(drawings, "train", seed=3, **arguments).epoch(2))
    parts: dict[int, torch.Tensor] = {}
    for rank in range(world_size):
        with open_stream(
            drawings, "train", seed=3, rank=rank, world_size=world_size, num_loaders=num_loaders, **arguments
        ) as stream:
            parts |= by_sample(stream.epoch(2))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[index], whole[index]) for index in whole)
    for other in (
        by_sample(open_stream(drawings, "train", seed=3, **arguments).epoch(1)),
        by_sample(open_stream(drawings, "train", seed=4, **arguments).epoch(2)),
    ):
        assert not any(torch.equal(other[index], whole[index]) for index in whole)


@pytest.fixture(scope="module")
def run(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run with the sketch transform and ten crops, as a user would configure it."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    spec = small_spec(drawings, model=small_spec(drawings).model | {"num_classes": 2})
    data = replace(
        spec.data, batch_size=10, eval_batch_size=3, transform="sketch", ten_crop=True, mean=[0.1], std=[0.5]
    )
    spec = replace(spec, data=data)
    assert train(spec, folder, world=World.current()).status == "finished"
    return Path(best_checkpoint(folder.checkpoints).path)


def test_validation_in_the_loop_is_evaluation_on_ten_crops(run: Path, drawings: Path) -> None:
    net = load_trained(run)
    prepared = prepare(drawings, net.spec, "sketch", (0.1,), (0.5,))
    found = evaluate_on(net, net.spec, prepared, drawings, ten_crop=True)
    state = torch.load(run, weights_only=False)["metrics"]
    assert found["num_samples"] == 10
    assert found["top1"] == state["val_top1"]
    assert found["loss"] == pytest.approx(state["val_loss"], rel=1e-5)
    assert evaluate_on(net, net.spec, prepared, drawings)["loss"] != pytest.approx(found["loss"], rel=1e-5)


def test_an_exported_file_prepares_its_images_as_they_were_in_training(
    run: Path, drawings: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    export(run, path, train_data=drawings, val_data=drawings, transform="sketch", mean=(0.1,), std=(0.5,))
    packed, net = load_packed(path), load_trained(run)
    assert packed.normalization == Normalization((0.1,), (0.5,), "sketch")
    for ten_crop in (True, False):
        of_file = evaluate_on(packed, packed.spec, packed.normalization, drawings, ten_crop=ten_crop)
        of_run = evaluate_on(net, net.spec, packed.normalization, drawings, ten_crop=ten_crop)
        assert of_file == pytest.approx(of_run, rel=1e-5)
    image = tmp_path / "bar.png"
    Image.new("L", (50, 40), 255).save(image)
    blank = -torch.ones(1, 1, SIZE, SIZE) * (0.1 / 0.5)
    (seen,) = predict(path, [image])
    expected = packed(blank).softmax(dim=1)[0].max().item()
    assert seen.classes[0][1] == pytest.approx(expected, rel=1e-5)


def test_a_file_from_before_there_were_transforms_still_loads(run: Path, drawings: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export(run, path, train_data=drawings, val_data=drawings, transform="sketch")
    content = read(path)
    del content.extras["normalization"]["transform"]
    write(path, Content(content.spec, content.extras, content.tensors))
    normalization = load_packed(path).normalization
    assert normalization is not None
    assert normalization.transform == "auto"


def test_ten_crops_of_a_transform_that_does_not_crop_fail_the_run(drawings: Path, tmp_path: Path) -> None:
    spec = small_spec(drawings, model=small_spec(drawings).model | {"num_classes": 2})
    spec = replace(spec, data=replace(spec.data, ten_crop=True))
    result = train(spec, RunFolder(tmp_path), world=World.current())
    assert result.status == "failed"
    assert result.message.startswith("rank 0: data.ten_crop: auto resizes images")


def test_a_file_of_a_transform_that_does_not_crop_has_no_ten_crops(run: Path, drawings: Path) -> None:
    net = load_trained(run)
    with pytest.raises(InvalidInputError, match=r"^data\.ten_crop: plain resizes"):
        evaluate_on(net, net.spec, prepare(drawings, net.spec, "plain"), drawings, ten_crop=True)
