"""The manifest file: what is written is read back, and anything else is refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dabnn.data import load_manifest
from dabnn.data.manifest import MANIFEST_NAME, Split, write_manifest
from dabnn.errors import DabError, InvalidInputError


def test_a_manifest_survives_the_file(digits: Path, tmp_path: Path) -> None:
    manifest = load_manifest(digits)
    write_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest
    assert load_manifest(tmp_path).digest == manifest.digest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


VERSION_1 = {
    "source": "/photos",
    "classes": ["ant", "bee"],
    "image": {
        "channels": 1,
        "height": 8,
        "width": 9,
        "mean": [0.25],
        "std": [0.5],
        "gray_mean": 0.25,
        "gray_std": 0.5,
    },
    "splits": {
        split: {
            "num_samples": 3,
            "num_bytes": 2048,
            "shards": [
                {
                    "name": f"{split}-{n}.tar",
                    "num_samples": 2 - n,
                    "num_bytes": 1024,
                    "sha256": "a",
                    "index_sha256": "b",
                }
                for n in range(2)
            ],
        }
        for split in ("train", "val")
    },
    "format_version": 1,
}


def test_version_1_is_read_with_the_digest_that_it_always_had(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(VERSION_1))
    manifest = load_manifest(tmp_path)
    content = {key: value for key, value in VERSION_1.items() if key != "source"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert manifest.digest == hashlib.sha256(text.encode()).hexdigest()
    assert manifest.split("train").class_counts == ()
    assert manifest.image.max_width == 0
    (tmp_path / "copy").mkdir()
    write_manifest(tmp_path / "copy", manifest)
    assert json.loads((tmp_path / "copy" / MANIFEST_NAME).read_text()) == VERSION_1


def test_the_digest_is_that_of_the_content_and_not_of_its_place(digits: Path) -> None:
    manifest = load_manifest(digits)
    val = manifest.split("val")
    moved = Split.of(tuple(shard._replace(url=f"s3://data/{shard.name}") for shard in val.shards), val.class_counts)
    altered = Split.of((val.shards[0]._replace(sha256="0"), *val.shards[1:]), val.class_counts)
    moved = Split.of(tuple(shard._replace(mtime_ns=7) for shard in moved.shards), val.class_counts)
    elsewhere = replace(manifest, source="/elsewhere", splits={**manifest.splits, "val": moved})
    assert elsewhere.digest == manifest.digest
    assert replace(manifest, splits={**manifest.splits, "val": altered}).digest != manifest.digest


def test_the_addresses_of_shards_survive_the_file(digits: Path, tmp_path: Path) -> None:
    manifest = load_manifest(digits)
    val = manifest.split("val").shards
    assert "mtime_ns" not in (digits / MANIFEST_NAME).read_text()
    moved = Split.of((val[0]._replace(url="https://host/a.tar"), val[0]._replace(name="b.tar", url="/b", mtime_ns=7)))
    manifest = replace(manifest, splits={"val": moved}, stored={"resize": 64, "encoding": "png"})
    write_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest


def test_the_totals_are_sums_over_shards(digits: Path) -> None:
    for split in load_manifest(digits).splits.values():
        assert split.num_samples == sum(shard.num_samples for shard in split.shards)
        assert split.num_bytes == sum((digits / shard.name).stat().st_size for shard in split.shards)


def test_a_folder_without_manifest_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"no {MANIFEST_NAME}.*dab data build SRC"):
        load_manifest(tmp_path)


def test_another_format_version_is_refused(digits: Path, tmp_path: Path) -> None:
    content = json.loads((digits / MANIFEST_NAME).read_text()) | {"format_version": 99}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match="format version 99, this program reads 1 and 2"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("damage", ["half", "totals", "field", "short", "path", "twice"])
def test_a_damaged_manifest_is_refused(digits: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / MANIFEST_NAME
    shutil.copy(digits / MANIFEST_NAME, path)
    content = json.loads(path.read_text())
    if damage == "totals":
        content["splits"]["train"]["num_samples"] += 1
    elif damage == "field":
        del content["splits"]["val"]["shards"]["sha256"]
    elif damage == "short":
        content["splits"]["val"]["shards"]["sha256"].pop()
    elif damage == "path":
        content["splits"]["val"]["shards"]["name"][0] = "../val-000000.tar"
    elif damage == "twice":
        content["splits"]["val"]["shards"]["name"][0] = content["splits"]["val"]["shards"]["name"][1]
    text = json.dumps(content)
    path.write_text(text[: len(text) // 2] if damage == "half" else text)
    with pytest.raises(DabError, match=r"manifest\.json: .*build it again"):
        load_manifest(tmp_path)


def test_an_unknown_split_names_the_known_ones(digits: Path) -> None:
    with pytest.raises(InvalidInputError, match="test: the dataset has no such split, only train, val"):
        load_manifest(digits).split("test")
