"""Looking at a dataset: class counts, and pictures of samples as a network sees them."""

import json
from pathlib import Path

import numpy as np
import pytest
from image_tree import write_tree
from PIL import Image

from dabnn.data import build_dataset
from dabnn.data.images import decode_image
from dabnn.data.manifest import MANIFEST_NAME, load_manifest
from dabnn.data.reader import SampleReader
from dabnn.data.show import class_counts, contact_sheet
from dabnn.errors import InvalidInputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("show")
    source = write_tree(root / "images", size=(48, 48))
    Image.new("RGB", (48, 48), "red").save(source / "val" / "cat" / "red.png")
    build_dataset(str(source), root / "data")
    return root / "data"


def test_the_manifest_counts_the_samples_of_each_class(data: Path) -> None:
    assert class_counts(data, "train") == (12, 12, 12)
    assert class_counts(data, "val") == (4, 4, 5)


def test_a_version_1_manifest_is_counted_from_the_indexes(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / MANIFEST_NAME).read_text())
    for split in content["splits"].values():
        split["class_counts"] = []
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    assert class_counts(tmp_path, "val") == (4, 4, 5)


def test_the_sheet_holds_the_transformed_pixels_of_the_samples_it_names(data: Path) -> None:
    sheet = contact_sheet(data, "val", transform="plain", num_shown=100)
    manifest = load_manifest(data)
    assert sorted(sheet.labels) == [0] * 4 + [1] * 4 + [2] * 5
    reader = SampleReader(data, manifest.split("val"), 3)
    stored = {np.asarray(decode_image(data)).tobytes(): label for data, label in map(reader.read, range(13))}
    reader.close()
    pixels, step = np.asarray(sheet.image), (96 + 4, 96 + 16 + 4)
    for position, label in enumerate(sheet.labels):
        left, top = 4 + position % 8 * step[0], 4 + position // 8 * step[1]
        tile = pixels[top : top + 96 : 2, left : left + 96 : 2]
        assert stored.pop(tile.tobytes()) == label
    assert stored == {}


def test_train_is_shown_augmented_and_another_seed_shows_other_samples(data: Path) -> None:
    first, same, other = (contact_sheet(data, transform="crop_flip", num_shown=4, seed=seed) for seed in (0, 0, 1))
    assert first.image.tobytes() == same.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()
    assert first.image.tobytes() != contact_sheet(data, transform="plain", num_shown=4).image.tobytes()


def test_of_a_large_set_each_sample_is_shown_once(digits: Path) -> None:
    sheet = contact_sheet(digits, input_size=16, num_shown=30)
    assert (len(sheet.labels), sheet.input_size) == (30, 16)


def test_what_cannot_be_decoded_is_named_and_left_out(data: Path, tmp_path: Path) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = load_manifest(data).split("val").shards[0]
    content = (tmp_path / shard.name).read_bytes()
    (tmp_path / shard.name).write_bytes(content.replace(b"IDAT", b"iDAT"))
    sheet = contact_sheet(tmp_path, "val")
    assert len(sheet.bad) == shard.num_samples
    assert shard.name in sheet.bad[0]
    assert len(sheet.labels) == 13 - shard.num_samples


def test_unknown_words_are_refused(data: Path) -> None:
    with pytest.raises(InvalidInputError, match="only train, val"):
        contact_sheet(data, "test")
    with pytest.raises(InvalidInputError, match="Did you mean 'sketch'"):
        contact_sheet(data, transform="sketh")
