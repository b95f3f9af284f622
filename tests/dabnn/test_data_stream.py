"""The stream: the same steps on any number of workers and loaders, exactly once, resumable, and clear when damaged."""

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from image_tree import write_tree
from torchvision.datasets import ImageFolder

from dabnn.data import Batch, build_dataset, load_manifest, open_stream
from dabnn.data.loaders import start_server
from dabnn.data.reader import SampleReader
from dabnn.data.shards import StoredSample, index_path, load_index, write_shard
from dabnn.data.transforms import Transform, make_transform
from dabnn.errors import DabError, InvalidInputError
from dabnn.spec import AugmentSpec


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("stream") / "images", num_train=35, num_val=9)


@pytest.fixture(scope="module")
def data(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream") / "data"
    build_dataset(str(tree), root)
    return root


def augmented(root: Path) -> Transform:
    image = load_manifest(root).image
    return make_transform("crop_flip", input_size=8, in_channels=3, mean=image.mean, std=image.std, training=True)


def samples(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def equal(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        and a.global_size == b.global_size
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_workers_sees_the_same_samples_in_the_same_steps(data: Path, world_size: int) -> None:
    expected = samples(open_stream(data, "train", batch_size=12, num_workers_planned=3).epoch(4))
    parts = [
        list(open_stream(data, "train", batch_size=12, rank=r, world_size=world_size, num_workers_planned=3).epoch(4))
        for r in range(world_size)
    ]
    seen = [[index for part in step for index in part.indices.tolist()] for step in zip(*parts, strict=True)]
    assert seen == expected
    assert sorted(index for step in seen for index in step) == list(range(105))
    for step in zip(*parts, strict=True):
        assert {part.global_size for part in step} == {sum(len(part.labels) for part in step)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_covers_the_split_once_in_any_sharding(data: Path, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        stream = open_stream(data, "val", batch_size=4, shuffle=False, rank=rank, world_size=world_size)
        parts = samples(stream.epoch(0))
        assert len(parts) == stream.num_steps
        seen.extend(index for part in parts for index in part)
    assert seen == list(range(27))


def test_evaluation_on_more_workers_than_samples_leaves_some_without(digits: Path, tmp_path: Path) -> None:
    build_dataset(str(write_tree(tmp_path / "images", num_val=1)), tmp_path / "data")
    parts = [
        samples(open_stream(tmp_path / "data", "val", batch_size=4, shuffle=False, rank=rank, world_size=5).epoch(0))
        for rank in range(5)
    ]
    assert sorted(parts) == [[], [], [[0]], [[1]], [[2]]]


def test_augmented_images_do_not_depend_on_workers(data: Path) -> None:
    whole = open_stream(data, "train", batch_size=12, seed=3, transform=augmented(data))
    halves = [
        open_stream(data, "train", batch_size=12, seed=3, transform=augmented(data), rank=rank, world_size=2)
        for rank in range(2)
    ]
    for epoch in range(2):
        for step, *parts in zip(whole.epoch(epoch), *(half.epoch(epoch) for half in halves), strict=True):
            assert torch.equal(step.images, torch.cat([part.images for part in parts]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_mixed_images_do_not_depend_on_workers_also_where_a_share_cuts_a_pair(data: Path, world_size: int) -> None:
    image = load_manifest(data).image
    transform = make_transform(
        "crop_flip",
        input_size=8,
        in_channels=3,
        mean=image.mean,
        std=image.std,
        training=True,
        augment=AugmentSpec(mixup=0.4, cutmix=1.0),
    )
    arguments = {"batch_size": 30, "seed": 3, "transform": transform, "num_workers_planned": 6}
    whole = open_stream(data, "train", **arguments)
    parts = [open_stream(data, "train", rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
    for step, *shares in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert step.partner_labels is not None
        for field in ("images", "labels", "indices", "partner_labels", "weights"):
            assert torch.equal(getattr(step, field), torch.cat([getattr(share, field) for share in shares]))


def test_augmentation_differs_between_epochs_and_leaves_the_training_process_its_random_numbers(data: Path) -> None:
    stream = open_stream(data, "train", batch_size=105, transform=augmented(data))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = next(stream.epoch(0)), next(stream.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)
    by_index = [batch.images[batch.indices.argsort()] for batch in (first, second)]
    assert not torch.equal(*by_index)


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_loaders_change_nothing_over_epochs_and_a_seek(data: Path, num_loaders: int) -> None:
    arguments = {"batch_size": 16, "seed": 5, "transform": augmented(data)}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with (
        open_stream(data, "train", num_loaders=num_loaders, **arguments) as ahead,
        open_stream(data, "train", **arguments) as plain,
    ):
        assert equal(ahead.epoch(0), plain.epoch(0))
        assert equal(ahead.epoch(1), plain.epoch(1))
        assert equal(islice(ahead.epoch(2), 3), islice(plain.epoch(2), 3))
        assert equal(ahead.epoch(9, start_step=4), plain.epoch(9, start_step=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_closing_ends_the_loaders(data: Path) -> None:
    with open_stream(data, "train", batch_size=16, num_loaders=2) as stream:
        start_server(()).result()
        before = set(multiprocessing.active_children())
        next(stream.epoch(0))
        loaders = set(multiprocessing.active_children()) - before
        assert len(loaders) == 2
    assert not loaders & set(multiprocessing.active_children())


def read_until_killed(root: Path, connection: Connection) -> None:
    start_server(()).result()
    with open_stream(root, "train", batch_size=16, num_loaders=1) as stream:
        next(stream.epoch(0))
        connection.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(60)


def test_loaders_end_when_their_training_process_is_killed(data: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=read_until_killed, args=(data, there))
    process.start()
    loaders = here.recv()
    assert len(loaders) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in loaders):
        assert time.monotonic() < deadline, "the loader outlived its training process by 30 s"
        time.sleep(0.05)


@pytest.mark.parametrize("num_steps", [0, 1, 6, 7, 10])
@pytest.mark.parametrize("world_sizes", [(1, 1), (2, 1), (1, 2)])
def test_a_resumed_stream_continues_in_mid_epoch_on_any_number_of_workers(
    data: Path, num_steps: int, world_sizes: tuple[int, int]
) -> None:
    arguments = {"batch_size": 16, "seed": 1, "num_workers_planned": 2}
    before, after = world_sizes
    stopped = open_stream(data, "train", world_size=before, **arguments)
    epochs = (batch for epoch in range(3) for batch in stopped.epoch(epoch))
    for _ in islice(epochs, num_steps):
        pass
    position = pickle.loads(pickle.dumps(stopped.position()))
    assert position == {"epoch": num_steps // 7, "step": num_steps % 7}

    whole = open_stream(data, "train", **arguments)
    expected = samples(batch for epoch in range(2) for batch in whole.epoch(epoch))[num_steps:]
    resumed = [
        open_stream(data, "train", rank=rank, world_size=after, position=position, **arguments) for rank in range(after)
    ]
    seen = []
    while (now := resumed[0].position())["epoch"] < 2:
        for parts in zip(*resumed, strict=True):
            seen.append([index for part in parts for index in part.indices.tolist()])
        assert resumed[0].position() == {"epoch": now["epoch"] + 1, "step": 0}
    assert seen == expected


def test_iterating_gives_one_epoch_at_a_time(data: Path) -> None:
    stream = open_stream(data, "train", batch_size=16, position={"epoch": 0, "step": 5})
    assert len(list(stream)) == 2
    assert len(list(stream)) == 7
    assert stream.position() == {"epoch": 2, "step": 0}


def test_a_stream_gives_the_tensors_of_an_image_folder(tree: Path, data: Path) -> None:
    manifest = load_manifest(data)
    image = manifest.image
    transform = make_transform("plain", input_size=9, in_channels=3, mean=image.mean, std=image.std, training=False)
    folder = ImageFolder(str(tree / "train"), transform=transform)
    expected = {Path(path).relative_to(tree).as_posix(): position for position, (path, _) in enumerate(folder.samples)}
    names = [name for shard in manifest.splits["train"].shards for name in load_index(data, shard).names]
    assert manifest.classes == tuple(folder.classes)
    for batch in open_stream(data, "train", batch_size=20, transform=transform).epoch(0):
        for pixels, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
            wanted, target = folder[expected[names[index]]]
            assert torch.equal(pixels, wanted)
            assert label == target


def test_the_default_transform_gives_images_of_zero_mean_and_unit_deviation(digits: Path) -> None:
    stream = open_stream(digits, "train", batch_size=1438)
    batch = next(iter(stream))
    assert batch.images.shape == (1438, 1, 8, 8)
    assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.float32, torch.int64, torch.int64)
    # float32 sums over 92,032 pixels.
    torch.testing.assert_close(batch.images.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.images.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_drop_leaves_samples_out_and_says_so(data: Path) -> None:
    stream = open_stream(data, "train", batch_size=16, remainder="drop")
    assert (stream.num_steps, stream.num_samples) == (6, 96)
    assert sum(len(batch.labels) for batch in stream.epoch(0)) == 96


def test_a_small_window_still_gives_each_sample_once(data: Path) -> None:
    stream = open_stream(data, "train", batch_size=16, window=10)
    assert sorted(index for step in samples(stream.epoch(0)) for index in step) == list(range(105))


def damaged_copy(data: Path, tmp_path: Path) -> tuple[Path, Path]:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    return copy, copy / "train-000002.tar"


def test_a_missing_shard_is_named_at_open(data: Path, tmp_path: Path) -> None:
    copy, shard = damaged_copy(data, tmp_path)
    shard.unlink()
    with pytest.raises(InvalidInputError, match=r"train-000002\.tar: missing; .*dab data check .*dab data build"):
        open_stream(copy, "train", batch_size=16)


def test_a_truncated_shard_is_named_at_open(data: Path, tmp_path: Path) -> None:
    copy, shard = damaged_copy(data, tmp_path)
    os.truncate(shard, 5000)
    with pytest.raises(InvalidInputError, match=r"train-000002\.tar: 5000 bytes, the manifest says .*dab data check"):
        open_stream(copy, "train", batch_size=16)


def test_shards_that_were_written_to_since_they_were_indexed_are_refused(data: Path, tmp_path: Path) -> None:
    source, dest = tmp_path / "theirs", tmp_path / "data"
    source.mkdir()
    for path in data.glob("*.tar"):
        shutil.copy(path, source)
    build_dataset(str(source), dest)
    shard = load_manifest(dest).splits["val"].shards[0]
    path = source / shard.name
    assert (shard.url, shard.mtime_ns) == (str(path), path.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    label = content.index(b"0" + bytes(511))
    content[label : label + 1] = b"1"
    path.write_bytes(content)
    os.utime(path, ns=(0, 7))
    with pytest.raises(
        InvalidInputError, match=rf"^{path}: the source changed since it was indexed; run `dab data build` again"
    ):
        open_stream(dest, "val", batch_size=6, shuffle=False)
    expected = load_manifest(dest).splits["val"].class_counts
    found = build_dataset(str(source), dest).splits["val"].class_counts
    assert found == (expected[0] - 1, expected[1] + 1, *expected[2:])
    assert load_manifest(dest).splits["val"].shards[0].mtime_ns == 7
    open_stream(dest, "val", batch_size=6, shuffle=False).close()


def test_a_missing_index_is_named_at_open(data: Path, tmp_path: Path) -> None:
    copy, shard = damaged_copy(data, tmp_path)
    index_path(shard).unlink()
    with pytest.raises(InvalidInputError, match=r"train-000002\.tar\.index\.json: missing"):
        open_stream(copy, "train", batch_size=16)


@pytest.mark.parametrize("num_loaders", [0, 1])
def test_an_image_that_does_not_decode_is_named_with_shard_key_and_file(
    data: Path, tmp_path: Path, num_loaders: int
) -> None:
    copy, shard = damaged_copy(data, tmp_path)
    entry = load_manifest(copy).splits["train"].shards[2]
    index = load_index(copy, entry)
    content = bytearray(shard.read_bytes())
    content[index.offsets[3] : index.offsets[3] + 8] = bytes(8)
    shard.write_bytes(content)
    with open_stream(copy, "train", batch_size=16, num_loaders=num_loaders) as stream:
        with pytest.raises(DabError) as caught:
            list(stream)
        failed = stream.position()
        with pytest.raises(DabError):
            next(iter(stream))
        assert stream.position() == failed
    message = str(caught.value)
    assert message.startswith(f"{shard}: sample {index.keys[3]} ({index.names[3]}): does not decode: ")
    assert "Traceback" not in message


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    build_dataset(str(write_tree(tmp_path / "images")), tmp_path / "data")
    manifest = load_manifest(tmp_path / "data")
    sample = StoredSample("00000000", "train/ant/0.png", "png", b"", 3)
    written = write_shard(tmp_path / "data" / "bad.tar", [sample])
    split = type(manifest.splits["train"]).of((written,))
    reader = SampleReader(tmp_path / "data", split, len(manifest.classes))
    with pytest.raises(DabError, match=r"bad\.tar: sample 00000000 \(train/ant/0\.png\): label 3 is outside the 3"):
        reader.read(0)


def test_a_shard_that_shrinks_while_it_is_read_is_named(data: Path, tmp_path: Path) -> None:
    copy, shard = damaged_copy(data, tmp_path)
    stream = open_stream(copy, "train", batch_size=16)
    os.truncate(shard, 600)
    with pytest.raises(DabError, match=r"train-000002\.tar: sample .*: the file ends before it"):
        list(stream)


def test_open_files_are_bounded_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_dataset(str(write_tree(tmp_path / "images", num_train=50)), tmp_path / "data", shard_bytes=4096)
    monkeypatch.setattr("dabnn.data.reader._MAX_OPEN_FILES", 4)
    gc.collect()
    process = psutil.Process()
    before = process.num_fds()
    stream = open_stream(tmp_path / "data", "train", batch_size=16)
    assert len(load_manifest(tmp_path / "data").splits["train"].shards) > 8
    most = max(process.num_fds() for _ in stream)
    assert before < most <= before + 4
    stream.close()
    assert process.num_fds() == before


def test_a_closed_stream_is_not_read(data: Path) -> None:
    stream = open_stream(data, "train", batch_size=16)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(iter(stream))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"^data\.batch_size: 0"),
        ({"batch_size": 9, "world_size": 2}, r"^data\.batch_size: 9 is not a positive multiple of 2"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, r"^rank: 2 is outside the 2 workers"),
        ({"batch_size": 8, "num_loaders": -1}, r"^data\.num_loaders: -1"),
        ({"batch_size": 8, "window": 0}, r"^data\.window: 0"),
        ({"batch_size": 8, "world_size": 2, "num_workers_planned": 1}, r"^cluster\.num_workers: 2 workers run"),
        ({"batch_size": 8, "position": {"epoch": 0, "step": 99}}, r"^position: epoch 0, step 99 is outside"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(data: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        open_stream(data, "train", **arguments)


def test_batches_that_are_read_here_leave_torch_its_threads(data: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [torch.get_num_threads() for _ in open_stream(data, "train", batch_size=16).epoch(0)] == [3] * 7
    finally:
        torch.set_num_threads(before)
