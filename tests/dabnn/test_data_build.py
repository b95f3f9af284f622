"""Building shards: deterministic bytes, a manifest that tells the truth, and every refusal of a bad source."""

import gc
import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import webdataset
from image_tree import write_tree
from PIL import Image

from dabnn.data import build_dataset, check_dataset, load_manifest
from dabnn.data.archive import ArchivedSample, read_archive
from dabnn.data.build_plan import plan_shards
from dabnn.data.encode import make_encoding
from dabnn.data.manifest import MANIFEST_NAME
from dabnn.data.shards import index_path, load_index
from dabnn.data.staging import STAGING_NAME
from dabnn.errors import DabError, InvalidInputError


def stored_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    first = build_dataset(str(source), tmp_path / "first")
    for path in source.rglob("*.png"):
        os.utime(path, (1, 1))
    second = build_dataset(str(source), tmp_path / "second")
    assert stored_files(tmp_path / "first") == stored_files(tmp_path / "second")
    assert first.digest == second.digest


def test_the_digest_does_not_depend_on_where_the_source_lies(tmp_path: Path) -> None:
    digests = [build_dataset(str(write_tree(tmp_path / name)), tmp_path / f"{name}-shards").digest for name in "ab"]
    assert digests[0] == digests[1]


def test_the_digest_changes_with_a_pixel(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    before = build_dataset(str(source), tmp_path / "data").digest
    Image.new("RGB", (6, 6)).save(source / "train" / "ant" / "0.png")
    assert build_dataset(str(source), tmp_path / "data").digest != before


def test_images_are_stored_as_they_came_with_their_label(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    manifest = build_dataset(str(source), tmp_path / "data")
    stored = {}
    for shard in manifest.splits["train"].shards:
        index = load_index(tmp_path / "data", shard)
        with (tmp_path / "data" / shard.name).open("rb") as file:
            for name, offset, size, label in zip(index.names, index.offsets, index.sizes, index.labels, strict=True):
                file.seek(offset)
                stored[name] = (file.read(size), manifest.classes[label])
    expected = {
        path.relative_to(source).as_posix(): (path.read_bytes(), path.parent.name)
        for path in (source / "train").rglob("*.png")
    }
    assert stored == expected


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_ordinary_webdataset_reads_the_shards(tmp_path: Path) -> None:
    manifest = build_dataset(str(write_tree(tmp_path / "images")), tmp_path / "data")
    urls = [str(tmp_path / "data" / shard.name) for shard in manifest.splits["val"].shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
    assert sorted(label for _, label in samples) == [0] * 4 + [1] * 4 + [2] * 4
    assert samples[0][0].size == (6, 6)
    # webdataset leaves its files to the garbage collector, which must find them while the warning is ignored.
    gc.collect()


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "ppm", "bmp", "webp", "PNG", "JPEG"])
def test_every_extension_is_stored_and_indexed(tmp_path: Path, extension: str) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split / "one").mkdir(parents=True)
        Image.new("RGB", (9, 5), (200, 10, 30)).save(tmp_path / "images" / split / "one" / f"a.b.{extension}")
    build_dataset(str(tmp_path / "images"), tmp_path / "data")
    assert check_dataset(tmp_path / "data") == []


def test_images_are_found_at_any_depth_and_other_files_are_not_samples(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", num_train=1, num_val=1)
    deep = source / "train" / "ant" / "2024" / "may"
    deep.mkdir(parents=True)
    Image.new("RGB", (6, 6)).save(deep / "x.png")
    (source / "train" / "ant" / "notes.txt").write_text("hello")
    (source / "train" / "ant" / "._0.png").write_text("a file manager's leftover")
    (source / "train" / ".cache").mkdir()
    manifest = build_dataset(str(source), tmp_path / "data")
    assert manifest.classes == ("ant", "bee", "cat")
    assert manifest.splits["train"].num_samples == 4


def test_small_sets_are_spread_over_eight_shards_that_mix_classes(tmp_path: Path) -> None:
    manifest = build_dataset(str(write_tree(tmp_path / "images", num_train=40)), tmp_path / "data")
    shards = manifest.splits["train"].shards
    assert [shard.num_samples for shard in shards] == [15] * 8
    for shard in shards:
        assert len(set(load_index(tmp_path / "data", shard).labels)) > 1


def test_shards_keep_to_the_wanted_size() -> None:
    blocks = plan_shards([1000] * 1000, 50_000)
    assert len(blocks) == 20
    assert [position for block in blocks for position in block] == list(range(1000))
    assert plan_shards([1000] * 3, 50_000) == [range(1), range(1, 2), range(2, 3)]


def test_the_statistics_are_those_of_the_pixels(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", size=(5, 7))
    image = build_dataset(str(source), tmp_path / "data").image
    pixels = np.stack([np.asarray(Image.open(path)) for path in (source / "train").rglob("*.png")]) / 255
    assert (image.channels, image.height, image.width) == (3, 5, 7)
    np.testing.assert_allclose(image.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(image.std, pixels.std((0, 1, 2)), rtol=1e-12)
    gray = np.stack([np.asarray(Image.open(path).convert("L")) for path in (source / "train").rglob("*.png")]) / 255
    np.testing.assert_allclose((image.gray_mean, image.gray_std), (gray.mean(), gray.std()), rtol=1e-12)


def test_a_gray_dataset_has_one_channel_and_serves_three(tmp_path: Path) -> None:
    image = build_dataset(str(write_tree(tmp_path / "images", colour=False)), tmp_path / "data").image
    assert image.channels == 1
    assert image.normalization(1) == (image.mean, image.std)
    assert image.normalization(3) == (image.mean * 3, image.std * 3)


def test_one_colour_image_makes_the_dataset_one_of_colour(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", colour=False)
    Image.new("RGB", (6, 6), (255, 0, 0)).save(source / "val" / "ant" / "0.png")
    image = build_dataset(str(source), tmp_path / "data").image
    assert image.channels == 3
    assert image.mean == (image.gray_mean,) * 3


def test_blank_images_can_still_be_normalised(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split / "blank").mkdir(parents=True)
        Image.new("L", (4, 4), 255).save(tmp_path / "images" / split / "blank" / "0.png")
    image = build_dataset(str(tmp_path / "images"), tmp_path / "data").image
    assert image.std == (0.0,)
    assert image.normalization(1) == ((1.0,), (1 / 255,))


def test_digits_are_split_per_class_with_a_fixed_seed(digits: Path) -> None:
    from sklearn.datasets import load_digits

    manifest = load_manifest(digits)
    assert manifest.classes == tuple("0123456789")
    table = load_digits()
    held_out = np.zeros(10, dtype=int)
    rows = set()
    for split in manifest.splits.values():
        for shard in split.shards:
            index = load_index(digits, shard)
            for sample, name, label in zip(read_archive(digits / shard.name), index.names, index.labels, strict=True):
                assert isinstance(sample, ArchivedSample)
                row = int(Path(name).stem)
                rows.add(row)
                held_out[label] += split is manifest.splits["val"]
                pixels = np.asarray(Image.open(io.BytesIO(sample.images[0])))
                assert table.target[row] == label
                assert np.array_equal(pixels, np.rint(table.images[row] * 255 / 16))
    assert rows == set(range(1797))
    assert held_out.tolist() == [round(count * 0.2) for count in np.bincount(table.target)]


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = write_tree(tmp_path / "images", num_train=3, num_val=2)
    build_dataset(str(source), tmp_path / "data", on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 15) for done in range(1, 16)]


def test_building_again_replaces_the_dataset_and_leaves_no_old_shard(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    build_dataset(str(source), tmp_path / "data", shard_bytes=4096)
    fewer = build_dataset(str(source), tmp_path / "data")
    assert check_dataset(tmp_path / "data") == []
    assert load_manifest(tmp_path / "data") == fewer


def test_a_destination_built_from_another_source_is_refused(tmp_path: Path, digits: Path) -> None:
    source = write_tree(tmp_path / "images")
    before = stored_files(digits)
    with pytest.raises(InvalidInputError, match=r"built from builtin:digits, not from .*images"):
        build_dataset(str(source), digits)
    assert stored_files(digits) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("chapter one")
    with pytest.raises(InvalidInputError, match="not empty, and holds no dataset"):
        build_dataset(str(write_tree(tmp_path / "images")), tmp_path / "mine")


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such folder"):
        build_dataset(str(tmp_path / "nowhere"), tmp_path / "data")


def test_a_source_without_splits_is_told_the_layout(tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "ant").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match=r"no folder val in it; the layout is .*/\{train,val\}/CLASS/IMAGE"):
        build_dataset(str(tmp_path / "images"), tmp_path / "data")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    (source / "val" / "bee" / "deeper").mkdir()
    for path in (source / "val" / "bee").glob("*.png"):
        path.unlink()
    with pytest.raises(InvalidInputError, match=r"val/bee: no image in the class folder"):
        build_dataset(str(source), tmp_path / "data")


def test_a_class_that_only_val_has_is_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    (source / "val" / "dog").mkdir()
    with pytest.raises(InvalidInputError, match=r"val/dog: the class is not in"):
        build_dataset(str(source), tmp_path / "data")


def test_images_that_do_not_decode_are_named_and_counted(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    whole = (source / "train" / "ant" / "0.png").read_bytes()
    (source / "train" / "ant" / "0.png").write_bytes(whole[:40])
    (source / "val" / "cat" / "1.png").write_text("not an image")
    with pytest.raises(InvalidInputError, match=r"train/ant/0\.png \(.*val/cat/1\.png \(.*: 2 of 48 images do not"):
        build_dataset(str(source), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_deep_pixels_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(source / "train" / "ant" / "0.png")
    with pytest.raises(InvalidInputError, match="only 8 bits a channel"):
        build_dataset(str(source), tmp_path / "data")


def test_a_failed_rebuild_leaves_the_dataset_as_it_was(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    build_dataset(str(source), tmp_path / "data")
    before = stored_files(tmp_path / "data")
    (source / "train" / "ant" / "0.png").write_text("not an image")
    with pytest.raises(InvalidInputError):
        build_dataset(str(source), tmp_path / "data")
    assert stored_files(tmp_path / "data") == before


def interrupt_half_way(done: int, total: int) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


def test_an_interrupted_build_goes_on_with_the_finished_shards(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    expected = build_dataset(str(source), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build_dataset(str(source), tmp_path / "data", on_progress=interrupt_half_way)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [STAGING_NAME]
    with pytest.raises(InvalidInputError, match=f"no {MANIFEST_NAME}, so no complete dataset"):
        load_manifest(tmp_path / "data")
    calls: list[tuple[int, int]] = []
    notes: list[str] = []
    build_dataset(
        str(source), tmp_path / "data", on_progress=lambda done, total: calls.append((done, total)), say=notes.append
    )
    assert notes == ["going on with 5 of 16 shards from a build that was cut off"]
    assert calls == [(done, 48) for done in range(22, 49)]
    assert stored_files(tmp_path / "data") == stored_files(tmp_path / "whole")
    assert load_manifest(tmp_path / "data") == expected


@pytest.mark.parametrize("change", ["source", "options", "shard"])
def test_shards_of_another_build_are_made_again(tmp_path: Path, change: str) -> None:
    source = write_tree(tmp_path / "images")
    with pytest.raises(KeyboardInterrupt):
        build_dataset(str(source), tmp_path / "data", on_progress=interrupt_half_way)
    if change == "source":
        Image.new("RGB", (6, 6), (1, 2, 3)).save(source / "train" / "ant" / "0.png")
    elif change == "shard":
        (tmp_path / "data" / STAGING_NAME / "train-000000.tar").write_bytes(b"short")
    encoding = make_encoding(encoding="webp") if change == "options" else None
    notes: list[str] = []
    build_dataset(str(source), tmp_path / "data", encoding=encoding, say=notes.append)
    assert [note for note in notes if "going on" in note] == (
        ["going on with 4 of 16 shards from a build that was cut off"] if change == "shard" else []
    )
    assert check_dataset(tmp_path / "data") == []
    build_dataset(str(source), tmp_path / "again", encoding=encoding)
    assert stored_files(tmp_path / "data") == stored_files(tmp_path / "again")


def test_what_a_killed_build_left_half_done_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "data" / STAGING_NAME).mkdir(parents=True)
    (tmp_path / "data" / STAGING_NAME / "train-000000.tar").write_text("half a shard")
    (tmp_path / "data" / STAGING_NAME / "train-000000.tar.finished.json").write_text("{")
    build_dataset(str(write_tree(tmp_path / "images")), tmp_path / "data")
    assert check_dataset(tmp_path / "data") == []
    assert not (tmp_path / "data" / STAGING_NAME).exists()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, num_processes: int) -> None:
    source = write_tree(tmp_path / "images")
    build_dataset(str(source), tmp_path / "one")
    calls: list[tuple[int, int]] = []
    build_dataset(
        str(source),
        tmp_path / "several",
        num_processes=num_processes,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert stored_files(tmp_path / "one") == stored_files(tmp_path / "several")
    assert calls[-1] == (48, 48)
    assert calls == sorted(calls)


def test_images_that_do_not_decode_are_named_and_counted_over_processes(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    for name in ("train/ant/0.png", "train/bee/1.png", "train/cat/2.png", "val/cat/1.png"):
        (source / name).write_text("not an image")
    with pytest.raises(InvalidInputError, match=r"; and 1 more: 4 of 48 images do not decode"):
        build_dataset(str(source), tmp_path / "data", num_processes=2)
    assert list((tmp_path / "data").iterdir()) == []


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    stat = os.statvfs(tmp_path)
    with (source / "train" / "ant" / "0.png").open("wb") as sparse:
        try:
            sparse.truncate(2 * stat.f_bavail * stat.f_frsize)
        except OSError:
            pytest.skip("the file system has no sparse files this large")
    with pytest.raises(DabError, match=r"no room .* needs about .* MiB are free"):
        build_dataset(str(source), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_room_that_runs_out_while_writing_removes_the_partial_files(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", num_train=100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DabError, match=r"no room \(File too large\)"):
            build_dataset(str(source), tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "data").iterdir()) == []


def test_unknown_words_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="Did you mean 'folder'"):
        build_dataset(str(tmp_path), tmp_path / "data", format="foldr")
    with pytest.raises(InvalidInputError, match="there is builtin:digits"):
        build_dataset("builtin:faces", tmp_path / "data")


def test_the_index_lies_beside_its_shard(digits: Path) -> None:
    for split in load_manifest(digits).splits.values():
        assert all(index_path(digits / shard.name).is_file() for shard in split.shards)
