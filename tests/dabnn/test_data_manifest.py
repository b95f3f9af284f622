"""The manifest file: what is written is read back, and anything else is refused."""

import json
import shutil
from pathlib import Path

import pytest

from dabnn.data import load_manifest
from dabnn.data.manifest import MANIFEST_NAME, write_manifest
from dabnn.errors import DabError, InvalidInputError


def test_a_manifest_survives_the_file(digits: Path, tmp_path: Path) -> None:
    manifest = load_manifest(digits)
    write_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest
    assert load_manifest(tmp_path).digest == manifest.digest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


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
    with pytest.raises(InvalidInputError, match="format version 99, this program reads 1"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("damage", ["half", "totals", "field"])
def test_a_damaged_manifest_is_refused(digits: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / MANIFEST_NAME
    shutil.copy(digits / MANIFEST_NAME, path)
    content = json.loads(path.read_text())
    if damage == "totals":
        content["splits"]["train"]["num_samples"] += 1
    elif damage == "field":
        del content["splits"]["val"]["shards"][0]["sha256"]
    text = json.dumps(content)
    path.write_text(text[: len(text) // 2] if damage == "half" else text)
    with pytest.raises(DabError, match=r"manifest\.json: .*build it again"):
        load_manifest(tmp_path)


def test_an_unknown_split_names_the_known_ones(digits: Path) -> None:
    with pytest.raises(InvalidInputError, match="test: the dataset has no such split, only train, val"):
        load_manifest(digits).split("test")
