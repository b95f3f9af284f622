"""The pipeline: torchvision's tensors sample by sample, the same for any sharding, mixed and cached as promised."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import write_tree
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dabnn.data import build_dataset, load_manifest, open_stream
from dabnn.data.decoded_cache import DecodedCache, open_decoded
from dabnn.data.draws import Draws, Purpose
from dabnn.data.mixing import beta, cut_boxes
from dabnn.data.pipeline import Pipeline, Prepared
from dabnn.data.reader import SampleReader
from dabnn.data.shard_cache import ShardCache
from dabnn.data.shards import load_index
from dabnn.data.transforms import CROPPING, NAMES, Transform, make_transform, resized_side
from dabnn.errors import InvalidInputError
from dabnn.spec import AugmentSpec

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("pipeline") / "images", num_train=20, num_val=10, size=(24, 24))


@pytest.fixture(scope="module")
def data(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline") / "data"
    build_dataset(str(tree), root)
    return root


def made(
    name: str = "crop_flip", size: int = 24, training: bool = True, ten_crop: bool = False, **augment: float
) -> Transform:
    return make_transform(
        name,
        input_size=size,
        in_channels=3,
        mean=MEAN,
        std=STD,
        training=training,
        ten_crop=ten_crop,
        augment=AugmentSpec(**augment),
    )


def pipeline(data: Path, transform: Transform, decoded: DecodedCache | None = None) -> Pipeline:
    manifest = load_manifest(data)
    return Pipeline(SampleReader(data, manifest.splits["train"], 3), transform, 5, decoded)


def equal(first: Prepared, second: Prepared) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


@pytest.mark.parametrize(("name", "ten_crop"), [*((n, False) for n in NAMES[1:]), *((n, True) for n in CROPPING)])
def test_a_stream_gives_the_tensors_of_torchvisions_image_folder(
    tree: Path, data: Path, name: str, ten_crop: bool
) -> None:
    sized = [v2.Resize(resized_side(18), antialias=True), v2.TenCrop(18) if ten_crop else v2.CenterCrop(18)]
    if name not in CROPPING:
        sized = [v2.Resize((18, 18), antialias=True)]
    finished = v2.Compose(
        [
            v2.PILToTensor(),
            *([v2.Lambda(v2.functional.invert)] if name.startswith("sketch") else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    folder = ImageFolder(str(tree / "val"), v2.Compose(sized))
    stream = open_stream(
        data, "val", batch_size=7, shuffle=False, transform=made(name, 18, training=False, ten_crop=ten_crop)
    )
    keys = [Path(path).name for path, _ in folder.samples]
    entry = load_manifest(data).splits["val"]
    names = [(name.split("/")[1], Path(name).name) for shard in entry.shards for name in load_index(data, shard).names]
    expected = {
        (folder.classes[label], key): (place, label)
        for place, ((_, label), key) in enumerate(zip(folder.samples, keys, strict=True))
    }
    seen = 0
    for batch in stream:
        for pixels, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
            place, wanted_label = expected[names[int(index)]]
            found, _ = folder[place]
            wanted = torch.stack([finished(crop) for crop in found]) if ten_crop else finished(found)
            assert int(label) == wanted_label
            assert torch.equal(pixels, wanted)
            seen += 1
    assert seen == 30


def test_inverting_whole_levels_differs_from_the_reference_by_rounding_alone() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    reference = (1 - levels / 255 - mean) / std
    # Of numbers up to 1: 3 roundings of 2^-25 each side before a division by 0.2, and one of 2^-24 x 4 after it.
    bound = 6 * 2**-25 / 0.2 + 2 * 2**-22
    assert float((made("sketch", training=False).batch(255 - levels) - reference).abs().max()) < bound


def test_what_becomes_of_a_sample_does_not_depend_on_its_batch(data: Path) -> None:
    transform = made("imagenet", 20, randaugment_ops=2, erasing=0.5)
    whole = pipeline(data, transform).batch(np.arange(60), 3)
    order = np.random.default_rng(0).permutation(60)
    parts = [pipeline(data, transform).batch(part, 3) for part in np.array_split(order, 7)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images[torch.from_numpy(order)])
    assert not torch.equal(pipeline(data, transform).batch(np.arange(60), 4).images, whole.images)


def test_another_augmentation_leaves_the_draws_of_the_first_as_they_were(data: Path) -> None:
    plain = pipeline(data, made()).batch(np.arange(60), 0, finished=False).images
    erased = pipeline(data, made(erasing=1.0)).batch(np.arange(60), 0, finished=False).images
    assert 0.5 < float((plain == erased).float().mean()) < 0.98


def test_images_that_are_not_finished_are_finished_by_the_transform(data: Path) -> None:
    transform = made()
    raw = pipeline(data, transform).batch(np.arange(10), 0, finished=False)
    assert raw.images.dtype == torch.uint8
    assert torch.equal(transform.batch(raw.images), pipeline(data, transform).batch(np.arange(10), 0).images)


@pytest.mark.parametrize("augment", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.7}])
def test_a_mixed_sample_is_a_mixture_of_two_augmented_ones(data: Path, augment: dict[str, float]) -> None:
    indices, partners = np.array([3, 41, 7, 8]), np.array([41, 3, 50, 8])
    found = pipeline(data, made(**augment)).batch(indices, 1, partners)
    alone = {
        index: pipeline(data, made()).batch(np.array([index]), 1) for index in {*indices.tolist(), *partners.tolist()}
    }
    assert found.partner_labels is not None
    assert found.weights is not None
    assert found.labels.tolist() == [int(alone[index].labels) for index in indices.tolist()]
    assert found.partner_labels.tolist() == [int(alone[index].labels) for index in partners.tolist()]
    assert float(found.weights[3]) == 1.0
    for image, own, other, weight in zip(
        found.images, indices.tolist(), partners.tolist(), found.weights.tolist(), strict=True
    ):
        mine, its = alone[own].images[0], alone[other].images[0]
        is_pasted = (image == its) | (image == mine)
        if bool(is_pasted.all()):
            share = float((image == mine).all(dim=0).float().mean())
            assert weight <= share + 1e-6  # equal where no pixel of the two is the same
            assert weight > share - 0.05
        else:
            torch.testing.assert_close(image, weight * mine + (1 - weight) * its, atol=1e-6, rtol=1e-6)


def test_mixtures_do_not_depend_on_the_number_of_workers(data: Path) -> None:
    arguments = {"batch_size": 12, "seed": 3, "transform": made(mixup=0.3, cutmix=1.0), "num_workers_planned": 4}
    whole = open_stream(data, "train", **arguments)
    parts = [open_stream(data, "train", rank=rank, world_size=4, **arguments) for rank in range(4)]
    for step, *shares in zip(whole.epoch(0), *(part.epoch(0) for part in parts), strict=True):
        assert torch.equal(step.images, torch.cat([share.images for share in shares]))
        assert torch.equal(step.weights, torch.cat([share.weights for share in shares]))
        assert torch.equal(step.partner_labels, torch.cat([share.partner_labels for share in shares]))


def damaged(data: Path, tmp_path: Path, *indices: int) -> Path:
    """A copy in which some samples of the first shard are no images."""
    copy = Path(shutil.copytree(data, tmp_path / "damaged"))
    entry = load_manifest(copy).splits["train"].shards[0]
    index = load_index(copy, entry)
    content = bytearray((copy / entry.name).read_bytes())
    for position in indices:
        content[index.offsets[position] : index.offsets[position] + 8] = bytes(8)
    (copy / entry.name).write_bytes(content)
    return copy


@pytest.mark.parametrize("is_cached", [False, True])
def test_samples_that_do_not_decode_are_left_out_and_named(data: Path, tmp_path: Path, is_cached: bool) -> None:
    copy = damaged(data, tmp_path, 2, 5)
    manifest = load_manifest(copy)
    decoded = open_decoded(tmp_path / "decoded", 10**9, manifest, "train", 3) if is_cached else None
    transform = made(mixup=1.0)
    for _ in range(2):
        found = pipeline(copy, transform, decoded).batch(np.arange(6), 0, np.arange(6) ^ 1)
        assert found.indices.tolist() == [0, 1, 3, 4]
        assert len(found.bad) == 2
        assert "does not decode" in found.bad[0]
        assert manifest.splits["train"].shards[0].name in found.bad[0]
        # A partner that is bad is not mixed in.
        assert [weight == 1.0 for weight in found.weights.tolist()] == [False, False, True, True]
        assert found.labels.tolist() == pipeline(data, transform).batch(np.array([0, 1, 3, 4]), 0).labels.tolist()


def test_a_batch_of_bad_samples_alone_is_empty(data: Path, tmp_path: Path) -> None:
    found = pipeline(damaged(data, tmp_path, 0, 1), made()).batch(np.arange(2), 0)
    assert (found.images.shape, len(found.labels), len(found.bad)) == ((0, 3, 24, 24), 0, 2)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_are_distributed_as_beta(alpha: float) -> None:
    shares = beta(alpha, Draws(0, 0, np.arange(50_000)).uniform(Purpose.MIXING, 53)[:, 3:])
    expected = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    assert shares.min() >= 0
    assert shares.max() <= 1
    for edge in (1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        assert (shares < edge).mean() == pytest.approx((expected < edge).mean(), abs=0.012)


def test_a_cut_rectangle_is_torchvisions() -> None:
    shares, centres = np.array([0.0, 0.36, 1.0, 0.5]), np.array([[0.5, 0.5], [0.0, 0.99], [0.3, 0.3], [0.26, 0.74]])
    top, bottom, left, right = cut_boxes(shares, 20, 10, centres).T
    half = 0.5 * np.sqrt(1 - shares)
    rows, columns = (centres * (20, 10)).astype(int).T
    assert top.tolist() == np.maximum(rows - (half * 20).astype(int), 0).tolist()
    assert bottom.tolist() == np.minimum(rows + (half * 20).astype(int), 20).tolist()
    assert left.tolist() == np.maximum(columns - (half * 10).astype(int), 0).tolist()
    assert right.tolist() == np.minimum(columns + (half * 10).astype(int), 10).tolist()


@pytest.mark.parametrize(("name", "size"), [("crop_flip", 24), ("imagenet", 18), ("crop_flip", 16)])
def test_a_cache_of_decoded_images_changes_nothing(data: Path, tmp_path: Path, name: str, size: int) -> None:
    transform = made(name, size, erasing=0.3)
    plain = pipeline(data, transform)
    decoded = open_decoded(tmp_path, 10**9, load_manifest(data), "train", 3)
    assert decoded is not None
    cached = pipeline(data, transform, decoded)
    for indices in (np.arange(10), np.arange(60)[::-1], np.arange(30)):
        for reader in (cached, pickle.loads(pickle.dumps(cached))):
            assert equal(reader.batch(indices, 2), plain.batch(indices, 2))
    assert len(decoded.missing(np.arange(60))) == 0
    cached.close()
    assert equal(cached.batch(np.arange(60), 0), plain.batch(np.arange(60), 0))


def header(path: Path) -> dict[str, object]:
    return json.loads(path.read_bytes()[:4096])


def test_a_complete_cache_survives_a_restart_of_the_machine_and_another_does_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(data)

    def missing_after_restart() -> int:
        again = open_decoded(tmp_path, 10**9, manifest, "train", 3)
        assert again is not None
        return len(again.missing(np.arange(60)))

    decoded = open_decoded(tmp_path, 10**9, manifest, "train", 3)
    assert decoded is not None
    pipeline(data, made(), decoded).batch(np.arange(40), 0)
    assert not header(decoded.path)["is_complete"]
    assert missing_after_restart() == 20
    monkeypatch.setattr("dabnn.data.decoded_cache._boot_id", lambda: "after the restart")
    assert missing_after_restart() == 60
    decoded = open_decoded(tmp_path, 10**9, manifest, "train", 3)
    assert decoded is not None
    pipeline(data, made(), decoded).batch(np.arange(60), 0)
    assert header(decoded.path)["is_complete"]
    monkeypatch.setattr("dabnn.data.decoded_cache._boot_id", lambda: "after the next")
    assert missing_after_restart() == 0


@pytest.mark.parametrize("content", [b"", b"not a header", b"{}", b"[1]"])
def test_a_cache_that_is_damaged_is_made_anew(data: Path, tmp_path: Path, content: bytes) -> None:
    manifest = load_manifest(data)
    first = open_decoded(tmp_path, 10**9, manifest, "train", 3)
    assert first is not None
    first.close()
    first.path.write_bytes(content.ljust(4096))
    second = open_decoded(tmp_path, 10**9, manifest, "train", 3)
    assert second is not None
    assert len(second.missing(np.arange(60))) == 60


def test_pixels_of_a_damaged_shard_go_with_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    split = load_manifest(root).split("train")
    shard, index = root / split.shards[0].name, load_index(root, split.shards[0])
    good = shard.read_bytes()
    bad = bytearray(good)
    # A whole image in another's place: what is damaged here does decode.
    other = min(range(1, len(index.sizes)), key=lambda position: index.sizes[position])
    assert index.sizes[other] <= index.sizes[0]
    start, size = index.offsets[other], index.sizes[other]
    bad[index.offsets[0] : index.offsets[0] + size] = good[start : start + size]

    def image(decoded_bytes: int) -> torch.Tensor:
        cache = ShardCache(tmp_path / "cache" / "shards")
        with open_stream(
            root, "train", batch_size=1, shuffle=False, cache=cache, decoded_bytes=decoded_bytes
        ) as stream:
            return next(iter(stream)).images

    before = image(10**9)
    shard.write_bytes(bad)
    os.utime(shard, ns=(0, 1))
    assert not torch.equal(image(10**9), before)
    shard.write_bytes(good)
    assert torch.equal(image(10**9), before)
    files = set((tmp_path / "cache" / "decoded").iterdir())
    image(10**9)
    assert set((tmp_path / "cache" / "decoded").iterdir()) == files
    monkeypatch.setattr("PIL.__version__", "another")
    image(10**9)
    assert set((tmp_path / "cache" / "decoded").iterdir()) > files


def test_images_of_several_sizes_or_too_many_bytes_are_not_cached(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert open_decoded(tmp_path, 0, load_manifest(data), "train", 3) is None
    assert open_decoded(tmp_path, 100_000, load_manifest(data), "train", 3) is None
    assert "takes 0.000108 GB decoded, more than the 0.0001 GB allowed" in caplog.text
    tree = write_tree(tmp_path / "images", size=(8, 8))
    write_tree(tmp_path / "images" / "more", size=(9, 8))
    (tmp_path / "images" / "more" / "train" / "ant" / "0.png").rename(tree / "train" / "ant" / "larger.png")
    shutil.rmtree(tmp_path / "images" / "more")
    build_dataset(str(tree), tmp_path / "mixed")
    assert open_decoded(tmp_path, 10**9, load_manifest(tmp_path / "mixed"), "train", 3) is None
    assert "not known to have one size" in caplog.text


def test_the_folder_of_decoded_images_stays_below_its_limit(data: Path, tmp_path: Path) -> None:
    manifest = load_manifest(data)
    stale = tmp_path / "stale"
    stale.write_bytes(bytes(100_000))
    os.utime(stale, (0, 0))
    first = open_decoded(tmp_path, 150_000, manifest, "train", 3)
    assert first is not None
    assert not stale.exists()
    # Another's that is in use is not dropped, and this one goes without.
    assert open_decoded(tmp_path, 150_000, manifest, "val", 3) is None
    first.close()
    assert open_decoded(tmp_path, 150_000, manifest, "val", 3) is not None
    assert not first.path.exists()


def test_a_folder_that_cannot_be_written_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match=r"^data\.decoded_cache_gb: .*file/decoded cannot hold"):
        open_decoded(tmp_path / "file" / "decoded", 10**9, load_manifest(data), "train", 3)


def _fill(data: Path, folder: Path, seed: int) -> None:
    decoded = open_decoded(folder, 10**9, load_manifest(data), "train", 3)
    order = np.random.default_rng(seed).permutation(60)
    for part in np.array_split(order, 10):
        pipeline(data, made(), decoded).batch(part, 0)


def test_processes_that_fill_a_cache_together_all_read_the_same(data: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=_fill, args=(data, tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    decoded = open_decoded(tmp_path, 10**9, load_manifest(data), "train", 3)
    assert decoded is not None
    assert len(decoded.missing(np.arange(60))) == 0
    assert equal(
        pipeline(data, made(), decoded).batch(np.arange(60), 1), pipeline(data, made()).batch(np.arange(60), 1)
    )
