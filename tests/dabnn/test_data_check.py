"""Checking finds each kind of damage in real files, and names the shard and the sample."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from image_tree import write_tree

from dabnn.data import Problem, build_dataset, check_dataset
from dabnn.data.manifest import MANIFEST_NAME, Shard, Split, load_manifest, write_manifest
from dabnn.data.shards import StoredSample, file_sha256, index_path, load_index, write_shard
from dabnn.errors import InvalidInputError

SHARD = "train-000003.tar"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    build_dataset(str(write_tree(root / "images", num_train=16)), root / "data")
    return root / "data"


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def kinds(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem.shard, problem.kind) for problem in problems]


def shard_entry(data: Path) -> Shard:
    return next(shard for shard in load_manifest(data).splits["train"].shards if shard.name == SHARD)


def alter(path: Path, offset: int, replacement: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(replacement)] = replacement
    path.write_bytes(content)


def rewrite(data: Path, change: Callable[[int, StoredSample], StoredSample | None]) -> None:
    """Writes the shard anew with changed samples, and a manifest that vouches for its files."""
    manifest = load_manifest(data)
    shard = shard_entry(data)
    index = load_index(data, shard)
    content = (data / SHARD).read_bytes()
    samples = []
    for position, (key, name, offset, size, label) in enumerate(
        zip(index.keys, index.names, index.offsets, index.sizes, index.labels, strict=True)
    ):
        changed = change(position, StoredSample(key, name, "png", content[offset : offset + size], label))
        samples.extend([] if changed is None else [changed])
    written = write_shard(data / SHARD, samples)
    claimed = Shard(SHARD, shard.num_samples, written.num_bytes, written.sha256, written.index_sha256)
    shards = tuple(claimed if old.name == SHARD else old for old in manifest.splits["train"].shards)
    splits = {**manifest.splits, "train": Split.of(shards)}
    write_manifest(data, type(manifest)(manifest.source, manifest.classes, manifest.image, splits))


def test_a_sound_dataset_has_no_problems(data: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert check_dataset(data, on_progress=lambda done, total: calls.append((done, total))) == []
    assert calls[-1] == (60, 60)
    assert len(calls) == 16


def test_a_missing_shard_is_found(data: Path) -> None:
    (data / SHARD).unlink()
    assert kinds(check_dataset(data)) == [(SHARD, "missing")]


def test_a_truncated_shard_is_found(data: Path) -> None:
    content = (data / SHARD).read_bytes()
    (data / SHARD).write_bytes(content[: len(content) // 2])
    problems = check_dataset(data)
    assert kinds(problems) == [(SHARD, "size")]
    assert f"{len(content) // 2} bytes, the manifest says {len(content)}" in problems[0].detail


def test_an_altered_image_is_found_with_its_sample(data: Path) -> None:
    index = load_index(data, shard_entry(data))
    alter(data / SHARD, index.offsets[2] + 20, b"\xff\xff\xff\xff")
    problems = check_dataset(data)
    assert kinds(problems) == [(SHARD, "checksum"), (SHARD, "decode")]
    assert f"sample {index.keys[2]}" in problems[1].detail


def test_one_flipped_bit_of_padding_is_found(data: Path) -> None:
    size = (data / SHARD).stat().st_size
    alter(data / SHARD, size - 1, b"\x01")
    assert kinds(check_dataset(data)) == [(SHARD, "checksum")]


def test_a_damaged_archive_is_found(data: Path) -> None:
    alter(data / SHARD, 0, b"\xff" * 512)
    found = kinds(check_dataset(data))
    assert found[0] == (SHARD, "checksum")
    assert (SHARD, "count") in found


def test_a_foreign_shard_is_found(data: Path) -> None:
    shutil.copy(data / SHARD, data / "train-000099.tar")
    assert kinds(check_dataset(data)) == [("train-000099.tar", "foreign")]


def test_a_label_outside_the_classes_is_found(data: Path) -> None:
    rewrite(data, lambda position, s: s if position else StoredSample(s.key, s.name, s.extension, s.data, 3))
    problems = check_dataset(data)
    assert kinds(problems) == [(SHARD, "label")]
    assert "label '3' is outside the 3 classes" in problems[0].detail


def test_a_missing_sample_is_found(data: Path) -> None:
    rewrite(data, lambda position, s: s if position else None)
    assert kinds(check_dataset(data)) == [(SHARD, "count")]


def test_an_undecodable_image_with_a_fitting_checksum_is_found(data: Path) -> None:
    rewrite(data, lambda position, s: s if position else StoredSample(s.key, s.name, s.extension, b"junk", s.label))
    problems = check_dataset(data)
    assert kinds(problems) == [(SHARD, "decode")]
    assert "not a readable" in problems[0].detail


def test_a_missing_or_altered_index_is_found(data: Path) -> None:
    index_path(data / SHARD).unlink()
    assert kinds(check_dataset(data)) == [(SHARD, "index")]
    index_path(data / SHARD).write_text("{}")
    assert kinds(check_dataset(data)) == [(SHARD, "index")]


@pytest.mark.parametrize("column", ["keys", "offsets", "sizes", "labels"])
def test_an_index_that_does_not_fit_its_shard_is_found(data: Path, column: str) -> None:
    path = index_path(data / SHARD)
    columns = json.loads(path.read_text())
    columns[column][1] = "nobody" if column == "keys" else columns[column][1] + 1
    path.write_text(json.dumps(columns))
    manifest = json.loads((data / MANIFEST_NAME).read_text())
    shards = manifest["splits"]["train"]["shards"]
    shards["index_sha256"][shards["name"].index(SHARD)] = hashlib.sha256(path.read_bytes()).hexdigest()
    (data / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert kinds(check_dataset(data)) == [(SHARD, "index")]


def test_all_problems_are_reported_together(data: Path) -> None:
    (data / "val-000000.tar").unlink()
    alter(data / SHARD, (data / SHARD).stat().st_size - 1, b"\x01")
    assert kinds(check_dataset(data)) == [(SHARD, "checksum"), ("val-000000.tar", "missing")]


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no complete dataset"):
        check_dataset(tmp_path)


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
