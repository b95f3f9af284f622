"""Checking finds each kind of damage in real files, and names the shard and the sample."""

import hashlib
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from image_tree import write_tree
from source_files import image_file, tar_bytes, write_files

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


def repack(data: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> None:
    """Writes the shard anew with changed members, and a manifest that vouches for the file."""
    members = []
    with tarfile.open(data / SHARD) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            members.append((member, stream.read()))
    change(members)
    with tarfile.open(data / SHARD, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    manifest = load_manifest(data)
    size, sha256 = (data / SHARD).stat().st_size, file_sha256(data / SHARD)
    shards = tuple(
        old._replace(num_bytes=size, sha256=sha256) if old.name == SHARD else old
        for old in manifest.splits["train"].shards
    )
    write_manifest(data, replace(manifest, splits={**manifest.splits, "train": Split.of(shards)}))


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


def test_a_sample_without_label_is_found(data: Path) -> None:
    repack(data, lambda members: members.pop(0))
    problems = check_dataset(data)
    assert (SHARD, "label") in kinds(problems)
    assert "0 labels" in problems[0].detail


def test_a_sample_without_image_is_found(data: Path) -> None:
    repack(data, lambda members: members.pop())
    problems = check_dataset(data)
    assert [(problem.kind, problem.detail.partition(": ")[2]) for problem in problems] == [
        ("decode", "0 images, expected 1"),
        ("index", f"{SHARD}.index.json differs"),
    ]


def test_a_key_that_comes_twice_is_found(data: Path) -> None:
    repack(data, lambda members: members.extend(members[:2]))
    assert [kind for _, kind in kinds(check_dataset(data))] == ["duplicate", "index", "count"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../../outside.png", tarfile.REGTYPE),
        ("/etc/outside.png", tarfile.REGTYPE),
        ("a/../../outside.png", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("device", tarfile.CHRTYPE),
    ],
)
def test_members_that_would_be_written_outside_are_found_and_not_extracted(
    data: Path, tmp_path: Path, name: str, kind: bytes
) -> None:
    repack(data, lambda members: members.append((member(name, kind), b"")))
    found = [problem for problem in check_dataset(data) if problem.kind == "member"]
    assert [problem.shard for problem in found] == [SHARD]
    assert repr(name) in found[0].detail
    assert not list(tmp_path.glob("outside*"))


def test_a_header_damaged_in_the_middle_is_not_taken_for_the_end(data: Path) -> None:
    index = load_index(data, shard_entry(data))
    alter(data / SHARD, index.offsets[1] - 512, b"\xff" * 512)
    problems = check_dataset(data)
    assert [problem.kind for problem in problems][-2:] == ["archive", "count"]
    assert f"the header at byte {index.offsets[1] - 512:,} is damaged" in problems[-2].detail


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**40, 2**62, 2**87, -(2**40)])
def test_a_size_that_only_a_header_claims_is_found_and_takes_no_memory(data: Path, kind: bytes, size: int) -> None:
    index = load_index(data, shard_entry(data))
    header = tarfile.TarInfo(f"{index.keys[1]}.png")
    header.type, header.size = kind, size
    alter(data / SHARD, index.offsets[1] - 512, header.tobuf(tarfile.GNU_FORMAT)[-1024:][:512])
    assert [problem.kind for problem in check_dataset(data)][-2:] == ["archive", "count"]


def test_an_image_of_50000_by_50000_pixels_is_refused_before_it_is_decoded(data: Path) -> None:
    header = struct.pack(">4sIIBBBBB", b"IHDR", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    rewrite(data, lambda position, s: s if position else StoredSample(s.key, s.name, s.extension, bomb, s.label))
    problems = check_dataset(data)
    assert kinds(problems) == [(SHARD, "decode")]
    assert "50000 x 50000 pixels" in problems[0].detail


def test_any_number_of_processes_finds_the_same(data: Path) -> None:
    (data / "val-000000.tar").unlink()
    alter(data / SHARD, load_index(data, shard_entry(data)).offsets[2] + 20, b"\xff\xff\xff\xff")
    alone = check_dataset(data)
    assert len(alone) == 3
    assert check_dataset(data, num_processes=2) == alone


def test_a_source_that_changed_since_is_found(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    build_dataset(str(source), tmp_path / "data")
    assert check_dataset(tmp_path / "data", source=str(source)) == []
    assert check_dataset(tmp_path / "data", source=str(source.rename(tmp_path / "moved"))) == []
    (tmp_path / "moved" / "train" / "ant" / "0.png").unlink()
    problems = check_dataset(tmp_path / "data", source=str(tmp_path / "moved"))
    assert kinds(problems) == [("", "source")]
    assert "train 35 now and 36 then, val 12 now and 12 then" in problems[0].detail


def test_a_source_whose_val_was_drawn_is_compared_with_the_same_draw(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images").joinpath("train")
    build_dataset(str(source), tmp_path / "data", val_fraction=0.25, seed=3)
    assert check_dataset(tmp_path / "data", source=str(source)) == []


def test_shards_of_others_with_labels_in_json_are_sound(tmp_path: Path) -> None:
    labels = {
        "0.json": b'{"label": 0}',
        "1.json": b'{"cls": 1, "text": "a bee"}',
        "2.cls": b"1",
        "2.json": b'{"cls": 0}',
    }
    files = labels | {f"{sample}.png": image_file(sample) for sample in range(3)}
    shard = tar_bytes(dict(sorted(files.items())))
    write_files(tmp_path, {"theirs/train-0.tar": shard, "theirs/val-0.tar": shard})
    manifest = build_dataset(str(tmp_path / "theirs"), tmp_path / "data")
    assert list(load_index(tmp_path / "data", manifest.splits["train"].shards[0]).labels) == [0, 1, 1]
    assert [split.class_counts for split in manifest.splits.values()] == [(1, 2), (1, 2)]
    assert check_dataset(tmp_path / "data") == []


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
