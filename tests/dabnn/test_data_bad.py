"""Samples that cannot be decoded: refused by default, else left out, counted and limited; and loaders that die."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from training import small_spec, torchrun

from dabnn.data import Batch, load_manifest, loaders, open_stream
from dabnn.data.shard_cache import ShardCache
from dabnn.data.shards import load_index
from dabnn.data.transforms import make_transform
from dabnn.distributed import World
from dabnn.errors import DabError, PassingError
from dabnn.run_folder import RunFolder
from dabnn.train import TrainResult, train


def damage(source: Path, target: Path, split: str, indices: list[int]) -> Path:
    """Copy a dataset and overwrite the pixels of some images of a split."""
    shutil.copytree(source, target)
    start = 0
    for entry in load_manifest(target).splits[split].shards:
        index, shard = load_index(target, entry), target / entry.name
        content = bytearray(shard.read_bytes())
        for place in (number - start for number in indices if 0 <= number - start < entry.num_samples):
            begin, end = index.offsets[place], index.offsets[place] + index.sizes[place]
            content[begin:end] = content[begin:end].replace(b"IDAT", b"IDAX")
        shard.write_bytes(content)
        start += entry.num_samples
    return target


def training_batches(data: Path, max_bad_fraction: float, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    with open_stream(
        data, "train", batch_size=32, max_bad_fraction=max_bad_fraction, rank=rank, world_size=world_size
    ) as stream:
        yield from stream.epoch(0)


@pytest.fixture(scope="module")
def damaged(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of 240 training images and one of 60 others cannot be decoded."""
    once = damage(small_digits, tmp_path_factory.mktemp("bad") / "once", "train", [3, 4])
    return damage(once, once.with_name("twice"), "val", [5])


@pytest.mark.parametrize("world_size", [1, 2])
def test_tolerated_bad_samples_are_left_out_and_the_rest_comes_once(damaged: Path, world_size: int) -> None:
    parts = [list(training_batches(damaged, 0.01, rank=rank, world_size=world_size)) for rank in range(world_size)]
    everything = [batch for part in parts for batch in part]
    good = sorted(index for batch in everything for index in batch.indices.tolist())
    assert good == [index for index in range(240) if index not in (3, 4)]
    assert sorted(index for batch in everything for index in batch.bad_indices.tolist()) == [3, 4]
    assert sum(batch.num_bad for batch in everything) == 2
    assert all(len(batch.images) == len(batch.labels) == len(batch.indices) for batch in everything)
    for step in zip(*parts, strict=True):
        assert {part.global_size for part in step} == {sum(len(part.indices) + part.num_bad for part in step)}


def test_more_bad_samples_than_tolerated_are_an_error_that_names_the_first(damaged: Path) -> None:
    with pytest.raises(DabError) as caught:
        list(training_batches(damaged, 0.005))
    assert str(caught.value).startswith(
        "data.max_bad_fraction: 2 of the 240 samples of epoch 1 cannot be decoded, more than 0.005 of them; the first: "
    )
    assert "does not decode" in str(caught.value)


def test_a_worker_with_a_single_good_sample_cannot_take_a_step(small_digits: Path, tmp_path: Path) -> None:
    damaged = damage(small_digits, tmp_path / "data", "train", list(range(239)))
    with pytest.raises(DabError, match=r"step 1 of epoch 1 are bad, and batch normalization needs 2 good ones"):
        list(training_batches(damaged, 0.999))


def test_an_evaluation_batch_may_be_all_bad(small_digits: Path, tmp_path: Path) -> None:
    damaged = damage(small_digits, tmp_path / "data", "val", list(range(8)))
    spec = small_spec(damaged, epochs=1)
    spec = replace(spec, data=replace(spec.data, max_bad_fraction=0.2, eval_batch_size=8))
    result = train(spec, RunFolder(tmp_path / "run"), world=World.current())
    assert (result.status, result.metrics["val_bad_samples"]) == ("finished", 8)


def run(data: Path, folder: Path, max_bad_fraction: float) -> TrainResult:
    spec = small_spec(data, epochs=2)
    return train(
        replace(spec, data=replace(spec.data, max_bad_fraction=max_bad_fraction)),
        RunFolder(folder),
        world=World.current(),
    )


def test_a_run_counts_bad_samples_in_its_metrics(damaged: Path, tmp_path: Path) -> None:
    result = run(damaged, tmp_path, 0.02)
    assert result.status == "finished", result.message
    assert (result.metrics["bad_samples"], result.metrics["val_bad_samples"]) == (2, 1)


def test_a_run_without_a_word_of_tolerance_has_no_such_metrics(small_digits: Path, tmp_path: Path) -> None:
    result = run(small_digits, tmp_path, 0.0)
    assert not [key for key in result.metrics if "bad" in key]


def test_a_run_above_the_limit_fails_and_names_the_first(damaged: Path, tmp_path: Path) -> None:
    result = run(damaged, tmp_path, 0.005)
    assert result.status == "failed"
    assert "data.max_bad_fraction: 2 of the 240 samples" in result.message


def test_bad_samples_of_all_workers_count_together(small_digits: Path, tmp_path: Path) -> None:
    # 12 of 240 are 0.05; two workers see about half of them each, which alone would be few enough.
    damaged = damage(small_digits, tmp_path / "data", "train", list(range(0, 120, 10)))
    spec = small_spec(damaged, epochs=1, num_workers=2)
    spec = replace(spec, data=replace(spec.data, max_bad_fraction=0.049))
    with pytest.raises(AssertionError, match=r"data\.max_bad_fraction: 12 of the 240 samples of epoch 1"):
        torchrun(spec, tmp_path / "run", 2)
    tolerant = replace(spec, data=replace(spec.data, max_bad_fraction=0.05))
    assert torchrun(tolerant, tmp_path / "tolerant", 2)["metrics"]["bad_samples"] == 12


def test_the_digest_of_the_order_counts_bad_samples_as_seen(small_digits: Path, damaged: Path, tmp_path: Path) -> None:
    orders = [
        run(data, tmp_path / name, 0.02).metrics["sample_order"]
        for name, data in (("intact", small_digits), ("damaged", damaged))
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("num_loaders", [0, 1])
def test_images_normalised_on_the_device_have_the_bits_of_those_normalised_before(
    small_digits: Path, num_loaders: int
) -> None:
    image = load_manifest(small_digits).image
    transform = make_transform(
        "crop_flip", input_size=16, in_channels=3, mean=image.mean * 3, std=image.std * 3, training=True
    )
    open_on = partial(
        open_stream, small_digits, "train", batch_size=32, seed=2, transform=transform, num_loaders=num_loaders
    )
    with open_on() as before, open_on(device=torch.device("cpu")) as later:
        for one, other in zip(before.epoch(1), later.epoch(1), strict=True):
            assert one.images.dtype is other.images.dtype is torch.float32
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_loaders_take_over_at_any_step_without_a_trace(
    small_digits: Path, num_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders.start_server(()).result()
    coming: Future[None] = Future()
    monkeypatch.setattr(loaders, "_server", coming)
    others = set(multiprocessing.active_children())
    with open_stream(small_digits, "train", batch_size=32, num_loaders=2) as stream:
        seen = []
        for step, batch in enumerate(stream.epoch(0)):
            seen.append(batch)
            assert bool(set(multiprocessing.active_children()) - others) == (step > num_before)
            if step == num_before:
                coming.set_result(None)
    with open_stream(small_digits, "train", batch_size=32) as plain:
        for one, other in zip(seen, plain.epoch(0), strict=True):
            assert torch.equal(one.indices, other.indices)
            assert torch.equal(one.images, other.images)


@pytest.mark.parametrize(("name", "is_left_to_loaders"), [("crop_flip", False), ("imagenet", True)])
def test_loaders_end_where_every_image_is_decoded_and_only_arithmetic_is_left(
    small_digits: Path, tmp_path: Path, name: str, is_left_to_loaders: bool
) -> None:
    loaders.start_server(()).result()
    transform = make_transform(name, input_size=8, in_channels=1, mean=(0.5,), std=(0.5,), training=True)
    others = set(multiprocessing.active_children())
    options = {"batch_size": 32, "transform": transform}
    cached = {"num_loaders": 1, "decoded_bytes": 10**8, "cache": ShardCache(tmp_path / "shards")}
    with (
        open_stream(small_digits, "train", **options, **cached) as stream,
        open_stream(small_digits, "train", **options) as plain,
    ):
        for epoch in range(3):
            for one, other in zip(stream.epoch(epoch), plain.epoch(epoch), strict=True):
                assert torch.equal(one.images, other.images)
        has_loaders = bool(set(multiprocessing.active_children()) - others)
    assert has_loaders == is_left_to_loaders


def test_a_machine_that_starts_no_process_is_told(small_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: Future[None] = Future()
    failed.set_exception(BlockingIOError(11, "Resource temporarily unavailable"))
    monkeypatch.setattr(loaders, "_server", failed)
    with (
        open_stream(small_digits, "train", batch_size=32, num_loaders=1) as stream,
        pytest.raises(DabError, match=r"data\.num_loaders: no loader process can be started .*Use 0"),
    ):
        next(stream.epoch(0))


def test_a_loader_that_is_killed_ends_the_run_with_a_reason(small_digits: Path) -> None:
    loaders.start_server(()).result()
    before = set(multiprocessing.active_children())
    with open_stream(small_digits, "train", batch_size=4, num_loaders=1) as stream:
        batches = stream.epoch(0)
        next(batches)
        for process in set(multiprocessing.active_children()) - before:
            os.kill(process.pid or 0, signal.SIGKILL)
        with pytest.raises(PassingError, match=r"data\.num_loaders: a loader process was killed, or ran out of memory"):
            list(batches)
        position = stream.position()
        assert len(list(stream.epoch(0, position["step"]))) == 60 - position["step"]
